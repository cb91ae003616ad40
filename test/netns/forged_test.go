package netns

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

// TestForgedSource: a pod with NET_ADMIN gives itself its neighbour's address and gets nothing
// from there. Its packets enter by its own port or veth, where that address is not redirected.
func TestForgedSource(t *testing.T) {
	onThese(t, forgeable(), func(t *testing.T, n *node) {
		n.proxy(impatient...)
		victim, forger := n.run("victim", "app"), n.run("forger", "other")
		n.wantOwn(victim, "app")
		// That landing finds what the proxy gets: from its own addresses the forger's connections
		// are the proxy's. They also make its gateway a known neighbour, which IPv6 would not
		// become from a forged address.
		for _, f := range fronts(forger) {
			n.wantOwnAt(forger, f.url, "other")
			source, err := n.dialService(forger, f.pod)
			n.must(err)
			if to, ok := n.landing(source); !ok || to.Addr() != testbed.NodeIP && to.Addr() != testbed.NodeIP6 {
				t.Errorf("a connection from the pod's own address %s landed at %s (%v), want the proxy", f.pod, to, ok)
			}
		}
		for _, f := range fronts(victim) {
			n.address(forger, "add", netip.PrefixFrom(f.pod, f.pod.BitLen()).String())
			n.wantSilenceOrRefusal(forger, f.pod)
		}
		strangers := []string{"10.201.0.200/32"}
		if n.ipv6 {
			strangers = append(strangers, "fd00:201::200/128")
		}
		// Addresses that are nobody's.
		for _, stranger := range strangers {
			n.address(forger, "add", stranger)
			n.wantSilenceOrRefusal(forger, netip.MustParsePrefix(stranger).Addr())
		}
		n.wantOnlyTheNodeAsked()
		n.wantOwn(forger, "other")
		if n.primary != "bridge" {
			// On a bridge the forger answers ARP for its neighbour's address by now: what is sent
			// to the neighbour is dropped at the forger's port (TestStolenAddress), which is
			// silence for the neighbour.
			n.wantOwn(victim, "app")
		}
	})
}

// forgeable returns all setups, with both families where the testbed has them.
func forgeable() []setup {
	all := slices.Clone(setups)
	for i, s := range all {
		all[i].ipv6 = s.primary != "calicolike"
	}
	return all
}
