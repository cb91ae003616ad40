package main

import (
	"testing"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"
)

func TestCheck(t *testing.T) {
	datapaths(t, func(t *testing.T, n *testNode) {
		args := n.args("c1", n.pod, pod4, pod6)
		wantCode(t, n.check(args), codeCheck, "no record")
		n.must(n.add(args))
		rules, state := n.rules(), n.state()
		n.must(n.check(args))
		if diff := cmp.Diff(rules, n.rules()); diff != "" {
			t.Errorf("CHECK changed %s", diff)
		}
		if diff := cmp.Diff(state, n.state()); diff != "" {
			t.Errorf("CHECK changed %s", diff)
		}
		wantCode(t, n.check(n.args("c1", n.pod, pod4)), codeCheck, pod6+" is on record")
		args.StdinData = n.conf(nil)
		wantCode(t, n.check(args), types.ErrInvalidNetworkConfig, "prevResult is missing")

		args = n.args("c1", n.pod, pod4, pod6)
		n.flush("redirections")
		if n.backend == "nftables" {
			n.run("nft flush chain ip kube2iam-cni guard")
			wantCode(t, n.check(args), codeCheck, "no redirection of c1@eth0", "10.1.0.5", "192.168.7.2:8181", "no guard in table ip kube2iam-cni")
		} else {
			n.run(n.backend + " -F FORWARD")
			wantCode(t, n.check(args), codeCheck, "no redirection of 10.1.0.5 to 192.168.7.2:8181", "no guard in filter FORWARD")
		}
		n.ip(n.host, "link set veth0 down", "link set veth0 name veth9")
		wantCode(t, n.check(args), codeCheck, "veth9", "veth0")
		n.ip(n.host, "link del veth9")
		wantCode(t, n.check(args), codeLink, "eth0")
	})
}
