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

// TestAddRollsBack has an ADD fail at each of its steps.
func TestAddRollsBack(t *testing.T) {
	for name, tc := range map[string]struct {
		break_ func(*testNode)
		code   uint
	}{
		"the jump is refused":       {func(n *testNode) { n.FailCommand(3, "-C PREROUTING") }, codeRules},
		"the append is refused":     {func(n *testNode) { n.FailCommand(1, "-A KUBE2IAM-CNI -s 10.1.0.5") }, codeRules},
		"the append is too late":    {func(n *testNode) { n.FailCommand(4, "-A KUBE2IAM-CNI -s 10.1.0.5") }, types.ErrTryAgainLater},
		"the second append fails":   {func(n *testNode) { n.FailCommand(1, "fd00:1::5") }, codeRules},
		"no ip6tables":              {func(n *testNode) { n.Must(os.Remove(filepath.Join(n.Commands, "ip6"+n.Backend[2:]))) }, codeNoIPTables},
		"the result can't be given": {func(n *testNode) { n.stdout = broken{} }, types.ErrIOFailure},
	} {
		t.Run(name, func(t *testing.T) {
			iptablesDatapaths(t, func(t *testing.T, n *testNode) {
				n.Must(n.add(n.Args("c0", n.NewPod(n.Kind, "veth1", "10.1.0.7", "fd00:1::7"), "10.1.0.7", "fd00:1::7")))
				rules, state := n.Rules(), n.State()
				n.out.Reset()
				tc.break_(n)
				wantCode(t, n.add(n.Args("c1", n.Pod, pod4, pod6)), tc.code)
				if diff := cmp.Diff(rules, n.Rules()); diff != "" {
					t.Error(diff)
				}
				if diff := cmp.Diff(state, n.State()); diff != "" {
					t.Error(diff)
				}
				if n.out.Len() > 0 {
					t.Errorf("printed %s", &n.out)
				}
			})
		})
	}
}

type broken struct{}

func (broken) Write([]byte) (int, error) { return 0, os.ErrClosed }

// TestAddRefuses has what no ADD can do anything with; none may leave a rule or a record, or make
// the state directory.
func TestAddRefuses(t *testing.T) {
	for name, tc := range map[string]struct {
		kind   string
		change func(*testNode, *skel.CmdArgs)
		code   uint
		says   []string
	}{
		"an unknown key": {"routed", func(n *testNode, args *skel.CmdArgs) {
			args.StdinData = n.Conf(map[string]any{"proxy": "x"})
		}, types.ErrInvalidNetworkConfig, []string{`"proxy"`}},
		"no prevResult": {"routed", func(n *testNode, args *skel.CmdArgs) {
			args.StdinData = n.Conf(nil)
		}, types.ErrInvalidNetworkConfig, []string{"prevResult is missing", "chain"}},
		"CNI_ARGS of half a pod": {"routed", func(n *testNode, args *skel.CmdArgs) {
			args.Args = "K8S_POD_NAME=x"
		}, types.ErrInvalidEnvironmentVariables, []string{"CNI_ARGS", "pod namespace"}},
		"a container ID that is no file name": {"routed", func(n *testNode, args *skel.CmdArgs) {
			args.ContainerID = strings.Repeat("c", 201)
		}, types.ErrInvalidEnvironmentVariables, []string{"container ID"}},
		"a namespace that is gone": {"routed", func(n *testNode, args *skel.CmdArgs) {
			args.Netns = "/run/netns/gone"
		}, types.ErrInvalidNetNS, []string{"/run/netns/gone"}},
		"the host's namespace": {"routed", func(n *testNode, args *skel.CmdArgs) {
			args.Netns = n.Netns.Path()
		}, types.ErrInvalidNetNS, []string{"host's own"}},
		"no such interface": {"routed", func(n *testNode, args *skel.CmdArgs) {
			args.IfName = "net1"
		}, codeLink, []string{"net1", "chain"}},
		"no veth": {"routed", func(n *testNode, args *skel.CmdArgs) {
			args.IfName = "lo"
		}, codeLink, []string{"lo", "no veth"}},
		"a host interface whose name iptables takes for many": {"routed", func(n *testNode, args *skel.CmdArgs) {
			n.IP(n.Netns, "link set veth0 down", "link set veth0 name veth+ up")
		}, codeRules, []string{`"veth+"`}},
		"no addresses": {"routed", func(n *testNode, args *skel.CmdArgs) {
			args.StdinData = n.Args("c1", n.Pod).StdinData
		}, codeAddresses, []string{"no IPs"}},
		"another interface's addresses": {"routed", func(n *testNode, args *skel.CmdArgs) {
			args.StdinData = n.Args("c1", n.Pod, "10.1.0.99").StdinData
		}, codeAddresses, []string{"10.1.0.99", pod4}},
		"no way out of the node": {"routed", func(n *testNode, args *skel.CmdArgs) {
			n.IP(n.Netns, "route del default via 192.168.7.1", "route del default via fd00:7::1")
		}, codeProxyIP, []string{"proxyIP"}},
		"a proxy of another family": {"routed", func(n *testNode, args *skel.CmdArgs) {
			conf := n.Args("c1", n.Pod, pod4).StdinData
			args.StdinData = n.Conf(map[string]any{"proxyIP": "fd00::1", "prevResult": decode(n.T, conf).(map[string]any)["prevResult"]})
		}, codeProxyIP, []string{"fd00::1", pod4}},
		"no iptables of the form": {"routed", func(n *testNode, args *skel.CmdArgs) {
			n.Must(os.Remove(filepath.Join(n.Commands, "iptables")))
		}, codeNoIPTables, []string{"iptables", "backend"}},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, tc.kind, "iptables")
			args := n.Args("c1", n.Pod, pod4, pod6)
			tc.change(n, args)
			wantCode(t, n.add(args), tc.code, tc.says...)
			if got := n.Run("nft list ruleset"); got != "" {
				t.Errorf("left %s", got)
			}
			if _, err := os.Stat(n.StateDir); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("made the state directory: %v", err)
			}
			if n.out.Len() > 0 {
				t.Errorf("printed %s", &n.out)
			}
		})
	}
}

// TestAddWithoutState has a state directory in which nothing can be made.
func TestAddWithoutState(t *testing.T) {
	for _, backend := range []string{"auto", "iptables"} {
		t.Run(backend, func(t *testing.T) {
			n := newNode(t, "routed", backend)
			n.Must(os.WriteFile(n.StateDir, nil, 0o644))
			wantCode(t, n.add(n.Args("c1", n.Pod, pod4)), codeState, n.StateDir)
			if got := n.Redirections(); len(got) > 0 {
				t.Errorf("left %v", got)
			}
		})
	}
}
