package main

import (
	"testing"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"
)

func TestCheck(t *testing.T) {
	datapaths(t, func(t *testing.T, n *testNode) {
		args := n.Args("c1", n.Pod, pod4, pod6)
		wantCode(t, n.check(args), codeCheck, "no record")
		n.Must(n.add(args))
		rules, state := n.Rules(), n.State()
		n.Must(n.check(args))
		if diff := cmp.Diff(rules, n.Rules()); diff != "" {
			t.Errorf("CHECK changed %s", diff)
		}
		if diff := cmp.Diff(state, n.State()); diff != "" {
			t.Errorf("CHECK changed %s", diff)
		}
		wantCode(t, n.check(n.Args("c1", n.Pod, pod4)), codeCheck, pod6+" is on record")
		args.StdinData = n.Conf(nil)
		wantCode(t, n.check(args), types.ErrInvalidNetworkConfig, "prevResult is missing")

		args = n.Args("c1", n.Pod, pod4, pod6)
		n.flush("redirections")
		if n.Backend == "nftables" {
			n.Run("nft flush chain ip kube2iam-cni guard")
			wantCode(t, n.check(args), codeCheck, "missing: redirection of 10.1.0.5 to 192.168.7.2:8181 of c1@eth0", "missing: rules of chain guard of table ip kube2iam-cni")
		} else {
			n.Run("iptables -t nat -F PREROUTING")
			wantCode(t, n.check(args), codeCheck, "missing: redirection of 10.1.0.5 to 192.168.7.2:8181", "missing: jump to KUBE2IAM-CNI")
		}
		n.IP(n.Netns, "link set veth0 down", "link set veth0 name veth9")
		wantCode(t, n.check(args), codeCheck, "veth9", "veth0")
		n.IP(n.Netns, "link del veth9")
		wantCode(t, n.check(args), codeLink, "eth0")
	})
}
