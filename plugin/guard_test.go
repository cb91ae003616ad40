package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// ip6Calls are those of the commands that were run since the last question which are for IPv6.
func (n *testNode) ip6Calls() []string {
	n.Helper()
	var calls []string
	for _, call := range n.calls() {
		if strings.HasPrefix(call, "ip6tables") {
			calls = append(calls, call)
		}
	}
	return calls
}

// TestIPv6GuardOfIPv4Pod is a pod whose network has IPv4 only, and which gives itself an IPv6 address: a node that forwards
// IPv6 must refuse it. On one that does not, IPv6 is not touched.
func TestIPv6GuardOfIPv4Pod(t *testing.T) {
	datapaths(t, func(t *testing.T, n *testNode) {
		n.serve(n.service, ":80", "service")
		address := "[" + service6 + "]:80"
		if got := n.dial(n.pod, pod6, address, 10*time.Second); got != "service to "+pod6 {
			t.Fatalf("before ADD: got %q", got)
		}
		args := n.args("c1", n.pod, pod4)
		forwarding := func(value string) {
			n.must(os.WriteFile("/proc/sys/net/ipv6/conf/all/forwarding", []byte(value), 0o644))
		}
		save := n.iptables("ip6tables") + "-save"

		forwarding("0")
		n.calls()
		n.must(n.add(args))
		n.must(n.check(args))
		if calls := n.ip6Calls(); calls != nil {
			t.Errorf("without forwarding it ran\n%s", strings.Join(calls, "\n"))
		}
		if rules := n.run(save); strings.Contains(rules, "kube2iam-cni") {
			t.Errorf("without forwarding:\n%s", rules)
		}

		forwarding("1")
		missing := "no guard in filter FORWARD; no guard in mangle POSTROUTING"
		if n.backend == "nftables" {
			missing = "no guard in table ip6 kube2iam-cni"
		}
		wantCode(t, n.check(args), codeCheck, missing)
		n.must(n.add(args))
		n.must(n.check(args))
		if got := n.dial(n.pod, pod6, address, 10*time.Second); got != "refused" {
			t.Errorf("after ADD: got %q", got)
		}
		if n.errors.Len() > 0 {
			t.Errorf("logged %s", &n.errors)
		}
		if n.backend == "nftables" {
			return
		}
		rules := n.run(save)
		for _, want := range []string{
			"-A FORWARD -d fd00:ec2::254/128 -p tcp -m tcp --dport 80 -m comment --comment kube2iam-cni -j REJECT --reject-with tcp-reset",
			"-A POSTROUTING -d fd00:ec2::254/128 -p tcp -m tcp --dport 80 -m addrtype ! --src-type LOCAL -m comment --comment kube2iam-cni -j DROP",
		} {
			if strings.Count(rules, want) != 1 {
				t.Errorf("want one %s:\n%s", want, rules)
			}
		}
		if strings.Contains(rules, "*nat") {
			t.Errorf("a table for what is not redirected:\n%s", rules)
		}
	})
}

// TestIPv4PodWithoutIP6Tables is a node that forwards IPv6 and cannot guard it: that is said, and no reason to refuse a pod
// that has no IPv6 address.
func TestIPv4PodWithoutIP6Tables(t *testing.T) {
	iptablesDatapaths(t, func(t *testing.T, n *testNode) {
		n.must(os.Remove(filepath.Join(n.commands, "ip6"+n.backend[2:])))
		args := n.args("c1", n.pod, pod4)
		n.must(n.add(args))
		if log := n.errors.String(); !strings.Contains(log, "level=WARN") || !strings.Contains(log, "ip6"+n.backend[2:]) {
			t.Errorf("logged %q", log)
		}
		n.must(n.check(args))
		wantCode(t, n.add(n.args("c1", n.pod, pod4, pod6)), codeNoIPTables, "ip6"+n.backend[2:])
	})
}
