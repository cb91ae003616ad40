package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"
)

// TestDelTolerates has each DEL that the specification or a runtime can come with, for a pod that
// is there.
func TestDelTolerates(t *testing.T) {
	for name, change := range map[string]func(*testNode, *skel.CmdArgs){
		"nothing unusual":           func(n *testNode, args *skel.CmdArgs) {},
		"no namespace":              func(n *testNode, args *skel.CmdArgs) { args.Netns = "" },
		"a namespace that is gone":  func(n *testNode, args *skel.CmdArgs) { args.Netns = "/run/netns/gone" },
		"no prevResult":             func(n *testNode, args *skel.CmdArgs) { args.StdinData = n.Conf(nil) },
		"no CNI_ARGS":               func(n *testNode, args *skel.CmdArgs) { args.Args = "" },
		"CNI_ARGS that ADD refuses": func(n *testNode, args *skel.CmdArgs) { args.Args = "K8S_POD_NAME=/;x" },
		"an unknown key":            func(n *testNode, args *skel.CmdArgs) { args.StdinData = n.Conf(map[string]any{"what": 1}) },
		"a value out of range":      func(n *testNode, args *skel.CmdArgs) { args.StdinData = n.Conf(map[string]any{"proxyPort": 0}) },
		"another proxy and service": func(n *testNode, args *skel.CmdArgs) {
			args.StdinData = n.Conf(map[string]any{"proxyPort": 1, "metadataIP": "1.1.1.1", "guard": false})
		},
		"another name of the network": func(n *testNode, args *skel.CmdArgs) { args.StdinData = n.Conf(map[string]any{"name": "renamed"}) },
		"another form of iptables": func(n *testNode, args *skel.CmdArgs) {
			args.StdinData = n.Conf(map[string]any{"backend": "iptables"})
		},
		"a prevResult that is nonsense": func(n *testNode, args *skel.CmdArgs) { args.StdinData = n.Conf(map[string]any{"prevResult": 7}) },
		"the interface gone":            func(n *testNode, args *skel.CmdArgs) { n.IP(n.Netns, "link del veth0") },
		"the rule gone":                 func(n *testNode, args *skel.CmdArgs) { n.Run("iptables -t nat -F KUBE2IAM-CNI") },
		"the base gone": func(n *testNode, args *skel.CmdArgs) {
			n.Run("iptables -t nat -F")
			n.Run("iptables -t nat -X")
		},
		"a record that cannot be read": func(n *testNode, args *skel.CmdArgs) {
			n.Must(os.WriteFile(filepath.Join(n.StateDir, "attachments", "c1@eth0.json"), []byte("{"), 0o644))
		},
		"the record gone": func(n *testNode, args *skel.CmdArgs) { n.Must(os.RemoveAll(n.StateDir)) },
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, "bridged", "iptables")
			n.Must(n.add(n.Args("c1", n.Pod, pod4, pod6)))
			args := n.Args("c1", n.Pod, pod4, pod6)
			change(n, args)
			for range 2 {
				n.Must(n.del(args))
				if ours := n.Redirections(); len(ours) > 0 {
					t.Errorf("left %s", strings.Join(ours, "\n"))
				}
				if state := n.State(); len(state) > 0 {
					t.Errorf("left %v", state)
				}
			}
		})
	}
}

// TestDelOfNobody is a container that had no ADD, as a pod has that is older than the plugin's
// installation.
func TestDelOfNobody(t *testing.T) {
	datapaths(t, func(t *testing.T, n *testNode) {
		nothing := n.Run("nft list ruleset") + n.Run("cat /proc/thread-self/net/ip_tables_names")
		n.Must(n.del(n.Args("c1", n.Pod, pod4)))
		if got := n.Run("nft list ruleset") + n.Run("cat /proc/thread-self/net/ip_tables_names"); got != nothing {
			t.Errorf("a first DEL made %s", got)
		}
		if _, err := os.Stat(n.StateDir); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("a first DEL made the state directory: %v", err)
		}
		n.Must(n.add(n.Args("c1", n.Pod, pod4)))
		rules, state := n.Rules(), n.State()
		for _, id := range []string{"c2", "c", "c11", strings.Repeat("c", 300)} {
			n.Must(n.del(n.Args(id, n.Pod, pod4)))
		}
		if diff := cmp.Diff(rules, n.Rules()); diff != "" {
			t.Error(diff)
		}
		if diff := cmp.Diff(state, n.State()); diff != "" {
			t.Error(diff)
		}
	})
}

// TestDelThatFails is the one error that stops the chain, and one that must not.
func TestDelThatFails(t *testing.T) {
	iptablesDatapaths(t, func(t *testing.T, n *testNode) {
		n.Must(n.add(n.Args("c1", n.Pod, pod4)))
		rules, state := n.Rules(), n.State()

		n.FailCommand(4, "-D KUBE2IAM-CNI")
		wantCode(t, n.del(n.Args("c1", n.Pod, pod4)), types.ErrTryAgainLater, "busy")
		n.FailCommand(2, "KUBE2IAM-CNI")
		n.Must(n.del(n.Args("c1", n.Pod, pod4)))
		if !strings.Contains(n.errors.String(), "it stays on record") {
			t.Errorf("logged %s", &n.errors)
		}
		n.FailCommand(0, "")
		if diff := cmp.Diff(rules, n.Rules()); diff != "" {
			t.Error(diff)
		}
		if diff := cmp.Diff(state, n.State()); diff != "" {
			t.Error(diff)
		}
		n.Must(n.del(n.Args("c1", n.Pod, pod4)))
		if len(n.Redirections()) > 0 || len(n.State()) > 0 {
			t.Errorf("left %v, %v", n.Redirections(), n.State())
		}
	})
}
