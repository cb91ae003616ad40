package main

import (
	"net"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/test/netnstest"
	"github.com/kube2iam-cni/kube2iam-cni/test/testhost"
)

// datapaths runs a test on each way of a pod's packets into the host, with each backend.
func datapaths(t *testing.T, test func(*testing.T, *testNode)) {
	datapathsBy(t, test, "iptables", "nftables")
}

// iptablesDatapaths is datapaths for what is iptables' alone: its commands, and the places of its
// rules.
func iptablesDatapaths(t *testing.T, test func(*testing.T, *testNode)) {
	datapathsBy(t, test, "iptables")
}

func datapathsBy(t *testing.T, test func(*testing.T, *testNode), backends ...string) {
	for _, kind := range []string{"routed", "bridged"} {
		for _, backend := range backends {
			t.Run(kind+"/"+backend, func(t *testing.T) { test(t, newNode(t, kind, backend)) })
		}
	}
}

// iptables is the form of a command for other programs' rules: the backend's own, where it has one.
func (n *testNode) iptables(family string) string {
	if form, ok := strings.CutPrefix(n.Backend, "iptables"); ok {
		return family + form
	}
	return family
}

// wantForgedDropped has a neighbour take the pod's addresses and dial from there. What the client
// meets tells nothing, for answers go to the addresses' owner: so what arrives at the proxy's port
// is counted. A last dial from the neighbour's own address is the control: when that is refused,
// all that the neighbour sent before has been through the host.
func (n *testNode) wantForgedDropped(neighbour *netnstest.Netns, address4, address6 string) {
	n.Helper()
	n.Run("nft add table inet test")
	n.Run("nft add chain inet test input { type filter hook input priority -300 ; }")
	n.Run("nft add rule inet test input tcp dport 8181 tcp flags & (syn | ack) == syn counter")
	delivered := func() string { return countedPackets.FindString(n.Run("nft list chain inet test input")) }
	n.Dial(n.Pod, pod4, address4, 10*time.Second)
	before := delivered()
	if before == "packets 0" {
		n.Error("a pod's own connection is not counted")
	}
	n.IP(neighbour, "addr add "+pod4+"/32 dev eth0", "addr add "+pod6+"/128 dev eth0 nodad")
	for from, address := range map[string]string{pod4: address4, pod6: address6} {
		if answer := n.Dial(neighbour, from, address, 300*time.Millisecond); answer != "silence" && answer != "refused" {
			n.Errorf("a neighbour from %s: %q", from, answer)
		}
	}
	n.IP(neighbour, "addr del "+pod4+"/32 dev eth0", "addr del "+pod6+"/128 dev eth0")
	for from, address := range map[string]string{"10.1.0.7": address4, "fd00:1::7": address6} {
		if answer := n.Dial(neighbour, from, address, 10*time.Second); answer != "refused" {
			n.Errorf("a neighbour from %s, afterwards: %q", from, answer)
		}
	}
	if after := delivered(); after != before {
		n.Errorf("the proxy had %s before a neighbour forged its source and %s after", before, after)
	}
	n.Run("nft delete table inet test")
	if n.Kind == "bridged" { // which learned the forger's address for the pod's
		n.Run("ip neigh flush dev br0")
		n.Run("ip -6 neigh flush dev br0")
	}
}

var countedPackets = regexp.MustCompile(`packets \d+`)

// TestDatapath follows a pod's connections to the metadata service through its life.
func TestDatapath(t *testing.T) {
	datapaths(t, func(t *testing.T, n *testNode) {
		n.Serve(n.Service, ":80", "service")
		n.Serve(n.Netns, net.JoinHostPort(testhost.Uplink4, "8181"), "proxy")
		n.Serve(n.Netns, net.JoinHostPort(testhost.Uplink6, "8181"), "proxy")
		// A second address that the network did not give to the pod.
		n.IP(n.Pod, "addr add 10.1.0.66/16 dev eth0", "addr add fd00:1::66/64 dev eth0 nodad")
		if n.Kind == "routed" {
			n.IP(n.Netns, "route add 10.1.0.66/32 dev veth0", "route add fd00:1::66/128 dev veth0")
		}
		neighbour := n.NewPod(n.Kind, "veth1", "10.1.0.7", "fd00:1::7")
		const long = 10 * time.Second
		want := func(when, what, got, want string) {
			t.Helper()
			if got != want {
				t.Errorf("%s, %s: got %q, want %q", when, what, got, want)
			}
		}
		address4, address6 := net.JoinHostPort(service4, "80"), net.JoinHostPort(service6, "80")

		want("before ADD", "IPv4", n.Dial(n.Pod, pod4, address4, long), "service to "+pod4)
		want("before ADD", "IPv6", n.Dial(n.Pod, pod6, address6, long), "service to "+pod6)

		args := n.Args("c1", n.Pod, pod4, pod6)
		n.Must(n.add(args))
		want("after ADD", "IPv4", n.Dial(n.Pod, pod4, address4, long), "proxy to "+pod4)
		want("after ADD", "IPv6", n.Dial(n.Pod, pod6, address6, long), "proxy to "+pod6)
		want("after ADD", "IPv4, another source", n.Dial(n.Pod, "10.1.0.66", address4, long), "refused")
		want("after ADD", "IPv6, another source", n.Dial(n.Pod, "fd00:1::66", address6, long), "refused")
		want("after ADD", "IPv4, a pod without ADD", n.Dial(neighbour, "", address4, long), "refused")
		want("after ADD", "IPv6, a pod without ADD", n.Dial(neighbour, "", address6, long), "refused")
		want("after ADD", "IPv4, the host", n.Dial(n.Netns, "", address4, long), "service to "+testhost.Uplink4)
		want("after ADD", "IPv6, the host", n.Dial(n.Netns, "", address6, long), "service to "+testhost.Uplink6)

		n.wantForgedDropped(neighbour, address4, address6)

		// Another program lets everything pass that is forwarded.
		for _, family := range []string{"iptables", "ip6tables"} {
			n.Run(n.iptables(family) + " -t filter -I FORWARD -j ACCEPT")
		}
		want("after ACCEPT", "IPv4", n.Dial(n.Pod, pod4, address4, long), "proxy to "+pod4)
		// The guard is in nftables with either backend. Its drop is final.
		want("after ACCEPT", "IPv4, another source", n.Dial(n.Pod, "10.1.0.66", address4, long), "refused")
		want("after ACCEPT", "IPv6, another source", n.Dial(n.Pod, "fd00:1::66", address6, long), "refused")
		want("after ACCEPT", "IPv4, the host", n.Dial(n.Netns, "", address4, long), "service to "+testhost.Uplink4)
		want("after ACCEPT", "IPv6, the host", n.Dial(n.Netns, "", address6, long), "service to "+testhost.Uplink6)
		for _, family := range []string{"iptables", "ip6tables"} {
			n.Run(n.iptables(family) + " -t filter -D FORWARD -j ACCEPT")
		}

		n.Must(n.del(args))
		want("after DEL", "IPv4", n.Dial(n.Pod, pod4, address4, long), "refused")
		want("after DEL", "IPv6", n.Dial(n.Pod, pod6, address6, long), "refused")
	})
}
