package node

import (
	"errors"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/hostlink"
)

// TestOutdated has what a bridged pod's rule of iptables matches go away under it: the mark is another one by now, or
// bridge-nf no longer tells the port, or tells it again. One round puts the pod right, and the next has nothing to do.
func TestOutdated(t *testing.T) {
	const nf = "/proc/sys/net/bridge/bridge-nf-call-iptables"
	for name, tc := range map[string]struct {
		before   string
		change   func(*testing.T, *Node)
		wantMark uint32
		wantRule string
	}{
		"another mark": {"0", func(_ *testing.T, n *Node) { n.Mark = 0x2000 }, 0x2000, "--mark 0x2000/0x2000"},
		"bridge-nf goes": {"1", func(t *testing.T, _ *Node) {
			if err := os.WriteFile(nf, []byte("0"), 0o644); err != nil {
				t.Fatal(err)
			}
		}, 0x1000, "--mark 0x1000/0x1000"},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNetwork(t)
			pod := n.namespace()
			n.run("ip link add br0 type bridge\nip link add veth0 type veth peer name eth0 netns " + path(pod) + "\nip link set veth0 master br0")
			n.in(pod, func() { n.run("ip addr add 10.1.0.5/24 dev eth0") })
			n.must(os.WriteFile(nf, []byte(tc.before), 0o644))
			node := n.real("iptables-nft")
			_, err := node.Attach(t.Context(), request(pod, "10.1.0.5"))
			n.must(err)
			tc.change(t, node)
			a := &Agent{
				Node: node, Links: hostlink.Links, Filtered: hostlink.Filtered, Addresses: hostlink.Addresses,
				Cut: func(netip.AddrPort) (int, error) { return 0, nil }, Cache: Cache{Chained: func() ([]string, error) { return nil, nil }},
			}
			n.must(a.Round(t.Context()))
			record, err := node.records().Get("c1", "eth0")
			n.must(err)
			rules := n.run("iptables-nft-save -t nat")
			if record.Mark != tc.wantMark || strings.Count(rules, "-A KUBE2IAM-CNI") != 1 || !strings.Contains(rules, tc.wantRule) {
				t.Errorf("mark %#x, rules\n%s", record.Mark, rules)
			}
			if did, err := would(t, a); err != nil || len(did) > 0 {
				t.Errorf("the next round would do %v, %v", did, err)
			}
		})
	}
}

// would is what a round would do.
func would(t *testing.T, a *Agent) ([]string, error) {
	s, err := a.state(nil)
	if err != nil {
		return nil, err
	}
	return s.repair(t.Context(), true)
}

// TestRefusedIsSaidOnce has a pod that cannot be adopted, for a reason that stays.
func TestRefusedIsSaidOnce(t *testing.T) {
	b := newBed(t, "nftables")
	b.NodeIP = func(hostlink.Family) (netip.Addr, error) { return netip.Addr{}, errors.New("no default route") }
	b.pod("c1", 7, "10.1.0.5")
	b.cached("c1", cacheEntry("c1", "/netns/c1", result("1.1.0", "10.1.0.5")))
	b.round()
	if said := b.log(); strings.Count(said, "a pod was not adopted") != 1 {
		t.Errorf("said %s", said)
	}
	b.idle("the second time")
	b.idle("the third time")
}
