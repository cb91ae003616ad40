package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
)

func TestStatus(t *testing.T) {
	for name, tc := range map[string]struct {
		backend string
		change  func(*testNode)
		says    string // nothing is success
	}{
		"all is there":       {"auto", func(n *testNode) {}, ""},
		"one form":           {"auto", func(n *testNode) { n.must(os.Remove(filepath.Join(n.commands, "iptables-nft"))) }, ""},
		"not the form asked": {"iptables-nft", func(n *testNode) { n.must(os.Remove(filepath.Join(n.commands, "iptables-nft"))) }, "iptables-nft"},
		"no iptables":        {"auto", func(n *testNode) { n.must(os.RemoveAll(n.commands)) }, ""},
		"nftables":           {"nftables", func(n *testNode) { n.must(os.RemoveAll(n.commands)) }, ""},
		"IPv6 only":          {"auto", func(n *testNode) { n.ip(n.host, "route del default via 192.168.7.1") }, ""},
		"no way out": {"auto", func(n *testNode) {
			n.ip(n.host, "route del default via 192.168.7.1", "route del default via fd00:7::1")
		}, "proxyIP"},
		"the state directory's place is a file": {"auto", func(n *testNode) { n.must(os.WriteFile(n.stateDir, nil, 0o755)) }, "stateDir"},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, "routed", tc.backend)
			tc.change(n)
			err := n.status(&skel.CmdArgs{StdinData: n.conf(nil)})
			if tc.says == "" {
				n.must(err)
			} else {
				wantCode(t, err, types.ErrPluginNotAvailable, tc.says)
			}
			if calls := n.calls(); calls != nil {
				t.Errorf("ran %v", calls)
			}
		})
	}
}
