package main

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/test/netnstest"
)

// ip6Calls are those of the commands that were run since the last question which are for IPv6.
func (n *testNode) ip6Calls() []string {
	n.Helper()
	var calls []string
	for _, call := range n.Calls() {
		if strings.HasPrefix(call, "ip6tables") {
			calls = append(calls, call)
		}
	}
	return calls
}

// TestIPv6GuardOfIPv4Pod is a pod whose network has IPv4 only, and which gives itself an IPv6
// address: a node must refuse it whether it forwarded IPv6 at the time of the ADD or begins to only
// afterwards.
func TestIPv6GuardOfIPv4Pod(t *testing.T) {
	datapaths(t, func(t *testing.T, n *testNode) {
		n.Serve(n.Service, ":80", "service")
		address := "[" + service6 + "]:80"
		if got := n.Dial(n.Pod, pod6, address, 10*time.Second); got != "service to "+pod6 {
			t.Fatalf("before ADD: got %q", got)
		}
		args := n.Args("c1", n.Pod, pod4)
		for _, forwarding := range []string{"0", "1"} {
			n.Must(os.WriteFile("/proc/sys/net/ipv6/conf/all/forwarding", []byte(forwarding), 0o644))
			n.Calls()
			n.Must(n.add(args))
			n.Must(n.check(args))
			if calls := n.ip6Calls(); calls != nil {
				t.Errorf("forwarding %s: it ran\n%s", forwarding, strings.Join(calls, "\n"))
			}
			n.Must(os.WriteFile("/proc/sys/net/ipv6/conf/all/forwarding", []byte("1"), 0o644))
			if got := n.Dial(n.Pod, pod6, address, 10*time.Second); got != "refused" {
				t.Errorf("forwarding %s: got %q", forwarding, got)
			}
		}
		if n.errors.Len() > 0 {
			t.Errorf("logged %s", &n.errors)
		}
	})
}

// TestGuardSurvivesFlushes is a pod that nothing is redirected for, on a node where everything that
// iptables has is flushed: no moment comes in which it reaches the real service.
func TestGuardSurvivesFlushes(t *testing.T) {
	datapaths(t, func(t *testing.T, n *testNode) {
		n.Serve(n.Service, ":80", "service")
		n.Must(n.add(n.Args("c1", n.Pod, pod4, pod6)))
		for _, family := range []string{"iptables", "ip6tables"} {
			for _, table := range []string{"nat", "filter", "mangle"} {
				n.Run(n.iptables(family) + " -t " + table + " -F")
			}
		}
		neighbour := n.NewPod(n.Kind, "veth1", "10.1.0.7", "fd00:1::7")
		for _, pod := range []*netnstest.Netns{n.Pod, neighbour} {
			for _, service := range []string{service4, service6} {
				if got := n.Dial(pod, "", net.JoinHostPort(service, "80"), 10*time.Second); n.Backend != "nftables" && got != "refused" || strings.HasPrefix(got, "service") {
					t.Errorf("%s: got %q", service, got)
				}
			}
		}
	})
}

// TestIPv4PodWithoutIP6Tables is a node that forwards IPv6 and has no command for it: nftables
// guards it all the same.
func TestIPv4PodWithoutIP6Tables(t *testing.T) {
	iptablesDatapaths(t, func(t *testing.T, n *testNode) {
		n.Serve(n.Service, ":80", "service")
		n.Must(os.Remove(filepath.Join(n.Commands, "ip6"+n.Backend[2:])))
		args := n.Args("c1", n.Pod, pod4)
		n.Must(n.add(args))
		n.Must(n.check(args))
		if got := n.Dial(n.Pod, pod6, "["+service6+"]:80", 10*time.Second); got != "refused" {
			t.Errorf("got %q", got)
		}
		wantCode(t, n.add(n.Args("c1", n.Pod, pod4, pod6)), codeNoIPTables, "ip6"+n.Backend[2:])
	})
}
