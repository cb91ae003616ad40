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
		"one form":           {"auto", func(n *testNode) { n.Must(os.Remove(filepath.Join(n.Commands, "iptables"))) }, ""},
		"not the form asked": {"iptables", func(n *testNode) { n.Must(os.Remove(filepath.Join(n.Commands, "iptables"))) }, "iptables"},
		"no iptables":        {"auto", func(n *testNode) { n.Must(os.RemoveAll(n.Commands)) }, ""},
		"nftables":           {"nftables", func(n *testNode) { n.Must(os.RemoveAll(n.Commands)) }, ""},
		"IPv6 only":          {"auto", func(n *testNode) { n.IP(n.Netns, "route del default via 192.168.7.1") }, ""},
		"no way out": {"auto", func(n *testNode) {
			n.IP(n.Netns, "route del default via 192.168.7.1", "route del default via fd00:7::1")
		}, "proxyIP"},
		"the state directory's place is a file": {"auto", func(n *testNode) { n.Must(os.WriteFile(n.StateDir, nil, 0o755)) }, "stateDir"},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, "routed", tc.backend)
			tc.change(n)
			err := n.status(&skel.CmdArgs{StdinData: n.Conf(nil)})
			if tc.says == "" {
				n.Must(err)
			} else {
				wantCode(t, err, types.ErrPluginNotAvailable, tc.says)
			}
			if calls := n.Calls(); calls != nil {
				t.Errorf("ran %v", calls)
			}
		})
	}
}
