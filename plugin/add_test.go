package main

import (
	"encoding/json"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/test/testhost"
)

var plain = cmp.Comparer(func(a, b netip.Addr) bool { return a == b })

// wantCode asserts that an error is a CNI error of the code, whose text has all the parts.
func wantCode(t *testing.T, err error, code uint, parts ...string) {
	t.Helper()
	var e *types.Error
	if !errors.As(err, &e) || e.Code != code {
		t.Errorf("got %#v, want code %d", err, code)
		return
	}
	for _, part := range parts {
		if !strings.Contains(e.Error(), part) {
			t.Errorf("got %q, want it to say %q", e.Error(), part)
		}
	}
}

func TestAddRecords(t *testing.T) {
	datapaths(t, func(t *testing.T, n *testNode) {
		args := n.Args("c1", n.Pod, pod4, pod6)
		n.Must(n.add(args))
		link, err := n.FindLink(args.Netns, "eth0")
		n.Must(err)
		want := &attachment.Record{
			ContainerID: "c1", IfName: "eth0", Network: "net", Netns: args.Netns,
			Pod:      attachment.Pod{Namespace: "team", Name: "c1", UID: "uid-c1"},
			IPs:      []netip.Addr{netip.MustParseAddr(pod4), netip.MustParseAddr(pod6)},
			HostLink: attachment.HostLink{Name: "veth0", Index: link.Index},
			Datapath: attachment.DatapathRouted,
			Backend:  attachment.Backend(n.Backend),
			Redirects: []attachment.Redirect{
				{Source: netip.MustParseAddr(pod4), Metadata: netip.MustParseAddrPort("169.254.169.254:80"), Proxy: netip.MustParseAddrPort("192.168.7.2:8181")},
				{Source: netip.MustParseAddr(pod6), Metadata: netip.MustParseAddrPort("[fd00:ec2::254]:80"), Proxy: netip.MustParseAddrPort("[fd00:7::2]:8181")},
			},
			Created: time.Date(2026, 11, 23, 11, 0, 0, 0, time.UTC),
		}
		if n.Kind == "bridged" {
			want.Datapath, want.HostLink.Bridge = attachment.DatapathBridged, "br0"
		}
		if diff := cmp.Diff(want, n.Record("c1"), plain, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
			t.Error(diff)
		}
		if diff := cmp.Diff([]string{"attachments/c1@eth0.json", "by-ip/" + pod4, "by-ip/" + pod6}, n.State()); diff != "" {
			t.Error(diff)
		}
		if n.errors.Len() > 0 {
			t.Errorf("logged %s", &n.errors)
		}
	})
}

// TestAddReturnsPrevResult has a result in each version that a chained plugin can meet, with what
// each can say.
func TestAddReturnsPrevResult(t *testing.T) {
	n := newNode(t, "routed", "iptables")
	for version, result := range map[string]string{
		"0.2.0": `{"cniVersion":"0.2.0","ip4":{"ip":"10.1.0.5/16","gateway":"10.1.0.1","routes":[{"dst":"0.0.0.0/0"}]},"dns":{"nameservers":["10.0.0.10"]}}`,
		"0.3.1": `{"cniVersion":"0.3.1","interfaces":[{"name":"br0","mac":"00:00:00:00:00:01"},{"name":"eth0","sandbox":"/ns"}],"ips":[{"version":"4","interface":1,"address":"10.1.0.5/16","gateway":"10.1.0.1"}],"dns":{}}`,
		"0.4.0": `{"cniVersion":"0.4.0","interfaces":[{"name":"eth0","sandbox":"/ns"}],"ips":[{"version":"4","interface":0,"address":"10.1.0.5/16"},{"version":"6","address":"fd00:1::5/64"}],"routes":[{"dst":"0.0.0.0/0","gw":"10.1.0.1"}],"dns":{}}`,
		"1.0.0": `{"cniVersion":"1.0.0","interfaces":[{"name":"eth0","mac":"00:00:00:00:00:02","sandbox":"/ns"}],"ips":[{"interface":0,"address":"10.1.0.5/16"}],"dns":{"domain":"x"}}`,
		"1.1.0": `{"cniVersion":"1.1.0","interfaces":[{"name":"eth0","mtu":9001,"sandbox":"/ns"}],"ips":[{"address":"10.1.0.5/16"}],"routes":[{"dst":"0.0.0.0/0","mtu":1400,"scope":0}]}`,
	} {
		t.Run(version, func(t *testing.T) {
			n.In(n.Netns, func() {
				n.out.Reset()
				args := n.Args("c1", n.Pod, pod4)
				args.StdinData = n.Conf(map[string]any{"cniVersion": version, "prevResult": json.RawMessage(result)})
				if err := n.add(args); err != nil {
					t.Error(err)
				}
			})
			if diff := cmp.Diff(decode(t, []byte(result)), decode(t, n.out.Bytes())); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func decode(t *testing.T, data []byte) (value any) {
	t.Helper()
	if err := json.Unmarshal(data, &value); err != nil {
		t.Fatalf("%v in %s", err, data)
	}
	return value
}

// TestSteadyState holds the number of process runs of an ADD and a DEL on a node that has pods, and
// that the ADD of another pod leaves rules and records of the neighbours alone.
func TestSteadyState(t *testing.T) {
	datapaths(t, func(t *testing.T, n *testNode) {
		if n.Backend == "nftables" {
			n.Backend = "auto"
		}
		n.Must(n.add(n.Args("c0", n.NewPod(n.Kind, "veth1", "10.1.0.7", "fd00:1::7"), "10.1.0.7", "fd00:1::7")))
		rules, state := n.Rules(), n.State()
		for _, ips := range [][]string{{pod4}, {pod4, pod6}} {
			n.Calls()
			n.Must(n.add(n.Args("c1", n.Pod, ips...)))
			if calls := n.Calls(); n.Backend == "auto" && len(calls) > 0 {
				t.Errorf("ADD of %v ran\n%s", ips, strings.Join(calls, "\n"))
			}
			n.Must(n.del(n.Args("c1", n.Pod, ips...)))
			if calls := n.Calls(); n.Backend == "auto" && len(calls) > 0 {
				t.Errorf("DEL of %v ran\n%s", ips, strings.Join(calls, "\n"))
			}
			if diff := cmp.Diff(rules, n.Rules()); diff != "" {
				t.Error(diff)
			}
			if diff := cmp.Diff(state, n.State()); diff != "" {
				t.Error(diff)
			}
		}
	})
}

func TestAddTwice(t *testing.T) {
	datapaths(t, func(t *testing.T, n *testNode) {
		n.Must(n.add(n.Args("c1", n.Pod, pod4, pod6)))
		rules, state := n.Rules(), n.State()
		n.Must(n.add(n.Args("c1", n.Pod, pod4, pod6)))
		if diff := cmp.Diff(rules, n.Rules()); diff != "" {
			t.Error(diff)
		}
		if diff := cmp.Diff(state, n.State()); diff != "" {
			t.Error(diff)
		}
		// The second one of another configuration, in the other form.
		n.Backend = map[string]string{"iptables": "nftables", "nftables": "iptables"}[n.Backend]
		args := n.Args("c1", n.Pod, pod4)
		args.StdinData = n.Conf(map[string]any{"proxyPort": 9999, "proxyIP": "192.168.7.9", "prevResult": decode(t, args.StdinData).(map[string]any)["prevResult"]})
		n.Must(n.add(args))
		if ours := n.Redirections(); len(ours) != 1 || strings.HasPrefix(ours[0], "nft ") != (n.Backend == "nftables") || n.Backend != "nftables" && !strings.Contains(ours[0], n.Backend) ||
			!strings.Contains(strings.ReplaceAll(ours[0], " . ", ":"), "192.168.7.9:9999") {
			t.Errorf("got %s", strings.Join(ours, "\n"))
		}
		if diff := cmp.Diff([]string{"attachments/c1@eth0.json", "by-ip/" + pod4}, n.State()); diff != "" {
			t.Error(diff)
		}
	})
}

// TestAddressIsReused is an address whose former holder's DEL never came.
func TestAddressIsReused(t *testing.T) {
	datapaths(t, func(t *testing.T, n *testNode) {
		n.Must(n.add(n.Args("old", n.Pod, pod4, pod6)))
		n.IP(n.Netns, "link del veth0")
		pod := n.NewPod(n.Kind, "veth1", pod4, "fd00:1::7")
		n.Must(n.add(n.Args("new", pod, pod4, "fd00:1::7")))
		ours := n.Redirections()
		if len(ours) != 2 || !strings.Contains(strings.Join(ours, " "), "new@eth0") || strings.Contains(strings.Join(ours, " "), "old@eth0") {
			t.Errorf("got %s", strings.Join(ours, "\n"))
		}
		if diff := cmp.Diff([]string{"attachments/new@eth0.json", "by-ip/" + pod4, "by-ip/fd00:1::7"}, n.State()); diff != "" {
			t.Error(diff)
		}
		rules, state := n.Rules(), n.State()
		n.Must(n.del(n.Args("old", n.Pod, pod4, pod6)))
		if diff := cmp.Diff(rules, n.Rules()); diff != "" {
			t.Errorf("the late DEL changed %s", diff)
		}
		if diff := cmp.Diff(state, n.State()); diff != "" {
			t.Errorf("the late DEL changed %s", diff)
		}
	})
}

// TestAddAfterDeath has a record without its rules, and rules whose record cannot be read: what is
// left of an ADD or a DEL that was killed.
func TestAddAfterDeath(t *testing.T) {
	for name, kill := range map[string]func(*testNode){
		"the record without rules": func(n *testNode) { n.flush("redirections") },
		"an unreadable record with rules": func(n *testNode) {
			n.Must(os.WriteFile(filepath.Join(n.StateDir, "attachments", "c1@eth0.json"), nil, 0o644))
		},
		"neither base nor rules": func(n *testNode) { n.flush("all") },
	} {
		t.Run(name, func(t *testing.T) {
			datapaths(t, func(t *testing.T, n *testNode) {
				n.Must(n.add(n.Args("c1", n.Pod, pod4)))
				rules, state := n.Rules(), n.State()
				kill(n)
				n.Must(n.add(n.Args("c1", n.Pod, pod4)))
				if diff := cmp.Diff(rules, n.Rules()); diff != "" {
					t.Error(diff)
				}
				if diff := cmp.Diff(state, n.State()); diff != "" {
					t.Error(diff)
				}
			})
		})
	}
}

// flush is what somebody else does to the node's rules: it takes all redirections away, or all
// rules there are.
func (n *testNode) flush(what string) {
	n.Helper()
	switch {
	case n.Backend == "nftables" && what == "redirections":
		n.Run("nft flush map ip kube2iam-cni " + map[string]string{"routed": "routed", "bridged": "bridged"}[n.Kind])
	case n.Backend == "nftables":
		n.Run("nft flush ruleset")
	case what == "redirections":
		n.Run(n.Backend + " -t nat -F KUBE2IAM-CNI")
	default:
		n.Run(n.Backend + " -t nat -F")
		n.Run(n.Backend + " -t nat -X")
		n.Run(n.Backend + " -t mangle -F")
		n.Run(n.Backend + " -F")
	}
}

// TestAddWithoutIPv6 is a node that has no IPv6 address for the proxy: a pod's is guarded all the
// same.
func TestAddWithoutIPv6(t *testing.T) {
	n := newNode(t, "routed", "iptables")
	n.IP(n.Netns, "route del default via fd00:7::1")
	n.Must(n.add(n.Args("c1", n.Pod, pod4, pod6)))
	if r := n.Record("c1"); len(r.IPs) != 2 || len(r.Redirects) != 1 {
		t.Errorf("recorded %+v", r)
	}
	if rules := n.Rules(); !strings.Contains(rules, "ip6 addresses: fd00:ec2::254") {
		t.Errorf("no guard in\n%s", rules)
	}
	if !strings.Contains(n.errors.String(), "ip="+pod6) {
		t.Errorf("logged %s", &n.errors)
	}
}

// TestAddOfNoPod is a container that no runtime called a pod.
func TestAddOfNoPod(t *testing.T) {
	n := newNode(t, "routed", "iptables")
	args := n.Args("c1", n.Pod, pod4)
	args.Args = "IP=10.1.0.5"
	n.Must(n.add(args))
	if diff := cmp.Diff(attachment.Pod{}, n.Record("c1").Pod); diff != "" {
		t.Error(diff)
	}
}

// TestLinkIsNotGuessed has results that name the wrong interface, as real plugins' do.
func TestLinkIsNotGuessed(t *testing.T) {
	for name, result := range map[string]string{
		"azure-vnet: the node's uplink, without sandbox": `{"cniVersion":"0.3.0","interfaces":[{"name":"eth0"}],"ips":[{"version":"4","address":"10.1.0.5/16","gateway":"10.1.0.1"}],"dns":{}}`,
		"aws-cni: an interface that does not exist":      `{"cniVersion":"0.4.0","interfaces":[{"name":"veth0"},{"name":"eth0","sandbox":"/ns"},{"name":"dummy0","sandbox":"0"}],"ips":[{"version":"4","interface":1,"address":"10.1.0.5/32"}],"dns":{}}`,
		"weave: none":               `{"cniVersion":"0.3.0","ips":[{"version":"4","address":"10.1.0.5/16","gateway":"10.1.0.1"}],"dns":{}}`,
		"bridge: the bridge first":  `{"cniVersion":"1.0.0","interfaces":[{"name":"uplink"},{"name":"veth9"},{"name":"eth0","sandbox":"/ns"}],"ips":[{"interface":2,"address":"10.1.0.5/16"}]}`,
		"an address of another one": `{"cniVersion":"1.0.0","interfaces":[{"name":"net1","sandbox":"/ns"},{"name":"eth0","sandbox":"/ns"}],"ips":[{"interface":0,"address":"10.9.0.5/16"},{"interface":1,"address":"10.1.0.5/16"}]}`,
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, "routed", "iptables")
			args := n.Args("c1", n.Pod)
			args.StdinData = n.Conf(map[string]any{"cniVersion": decode(t, []byte(result)).(map[string]any)["cniVersion"], "prevResult": json.RawMessage(result)})
			n.Must(n.add(args))
			if r := n.Record("c1"); r.HostLink.Name != "veth0" || len(r.IPs) != 1 || r.IPs[0].String() != pod4 {
				t.Errorf("recorded %+v", r)
			}
		})
	}
}

// TestNodeWithoutCommands is a node that has neither iptables nor nft: what the kernel has is
// enough.
func TestNodeWithoutCommands(t *testing.T) {
	for _, kind := range []string{"routed", "bridged"} {
		t.Run(kind, func(t *testing.T) {
			n := newNode(t, kind, "auto")
			n.Must(os.RemoveAll(n.Commands))
			n.Serve(n.Service, ":80", "service")
			n.Serve(n.Netns, net.JoinHostPort(testhost.Uplink4, "8181"), "proxy")
			neighbour := n.NewPod(kind, "veth1", "10.1.0.7", "fd00:1::7")
			args := n.Args("c1", n.Pod, pod4, pod6)
			n.Must(n.add(args))
			n.Must(n.check(args))
			if got := n.Record("c1").Backend; got != "nftables" {
				t.Errorf("recorded %s", got)
			}
			if got := n.Dial(n.Pod, pod4, net.JoinHostPort(service4, "80"), 10*time.Second); got != "proxy to "+pod4 {
				t.Errorf("the pod meets %q", got)
			}
			if got := n.Dial(neighbour, "", net.JoinHostPort(service4, "80"), 10*time.Second); got != "refused" {
				t.Errorf("a pod without ADD meets %q", got)
			}
			n.Must(n.del(args))
			if ours := n.Redirections(); len(ours) > 0 || len(n.State()) > 0 {
				t.Errorf("left %v, %v", ours, n.State())
			}
		})
	}
}
