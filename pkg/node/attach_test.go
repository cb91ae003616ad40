package node

import (
	"errors"
	"io/fs"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netns"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/hostlink"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/redirect"
)

// ourTables are those of nftables that are ours where the thread is.
func (n *network) ourTables() string {
	n.Helper()
	var ours []string
	for line := range strings.Lines(n.run("nft list tables")) {
		if strings.HasSuffix(strings.TrimSpace(line), " kube2iam-cni") {
			ours = append(ours, strings.TrimSpace(line))
		}
	}
	return strings.Join(ours, ", ")
}

// TestAttachInsideThePod has interfaces whose packets the host's rules do not see, on a node of each backend.
func TestAttachInsideThePod(t *testing.T) {
	for name, build := range map[string]func(*network, netns.NsHandle){
		"a macvlan": func(n *network, pod netns.NsHandle) {
			n.run(`ip link add uplink type veth peer name far
				ip link set uplink up
				ip link add eth0 netns ` + path(pod) + ` link uplink type macvlan mode bridge`)
		},
		"a veth to another pod": func(n *network, pod netns.NsHandle) {
			aside := n.namespace()
			n.in(aside, func() { n.run("ip link add veth0 type veth peer name eth0 netns " + path(pod)) })
		},
	} {
		t.Run(name, func(t *testing.T) {
			backends(t, func(t *testing.T, backend string) {
				n := newNetwork(t)
				pod := n.namespace()
				build(n, pod)
				n.in(pod, func() { n.run("ip addr add 10.1.0.5/24 dev eth0\nip addr add fd00:1::5/64 dev eth0 nodad") })
				node, r := n.real(backend), request(pod, "10.1.0.5", "fd00:1::5")
				_, err := node.Attach(t.Context(), r)
				if name != "a macvlan" {
					// It is a veth: that its host side is not here may be a fault, and the pod's being elsewhere is not taken for granted.
					if e, ok := errors.AsType[*Error](err); !ok || e.Kind != Link {
						t.Fatalf("got %v, want an error of the interface", err)
					}
					node.InPod = true
					_, err = node.Attach(t.Context(), r)
				}
				n.must(err)
				record, err := node.records().Get("c1", "eth0")
				n.must(err)
				if record.Datapath != attachment.DatapathPod || record.Backend != attachment.BackendNFTables || record.HostLink != (attachment.HostLink{}) {
					t.Errorf("the record says %s, %s, %+v", record.Datapath, record.Backend, record.HostLink)
				}
				n.wantGuardOnly()
				n.in(pod, func() {
					if got, want := n.ourTables(), "table ip kube2iam-cni, table ip6 kube2iam-cni"; got != want {
						t.Errorf("in the pod there is %q, want %q", got, want)
					}
				})
				check := func(want ...string) {
					t.Helper()
					wrong, err := node.Check(r)
					n.must(err)
					if diff := cmp.Diff(want, wrong); diff != "" {
						t.Error(diff)
					}
				}
				check()
				n.run("nft delete chain ip6 kube2iam-cni guard")
				check("no guard in table ip6 kube2iam-cni")
				n.must(node.rules.Guard(node.base(record)))
				n.in(pod, func() { n.run("nft flush map ip kube2iam-cni own") })
				check("no redirection of c1@eth0 from 10.1.0.5 to 192.168.7.2:8181 in own of table ip kube2iam-cni")
				n.must(node.Detach(t.Context(), "c1", "eth0"))
				n.in(pod, func() {
					if rules := n.run("nft list ruleset"); strings.Contains(rules, "c1@eth0") {
						t.Errorf("after DEL:\n%s", rules)
					}
				})
				check("no record")
			})
		})
	}
}

// TestAttachInsideThePodByConfiguration has a veth whose packets the host's rules would see.
func TestAttachInsideThePodByConfiguration(t *testing.T) {
	n := newNetwork(t)
	pod := n.namespace()
	n.run("ip link add veth0 type veth peer name eth0 netns " + path(pod))
	n.in(pod, func() { n.run("ip addr add 10.1.0.5/24 dev eth0") })
	node := n.real("nftables")
	node.InPod = true
	record, err := node.Attach(t.Context(), request(pod, "10.1.0.5"))
	n.must(err)
	// The host's side is on record: by it the agent knows whether the pod is there.
	if record.Datapath != attachment.DatapathPod || record.HostLink.Name != "veth0" || record.HostLink.Index == 0 {
		t.Errorf("the record says %s, %+v", record.Datapath, record.HostLink)
	}
	n.wantGuardOnly()
}

// wantGuardOnly wants the guard of both families on the host, and no pod.
func (n *network) wantGuardOnly() {
	n.Helper()
	rules := n.run("nft list ruleset")
	if got, want := n.ourTables(), "table ip kube2iam-cni, table ip6 kube2iam-cni"; got != want || strings.Count(rules, `drop comment "guard"`) != 4 || strings.Contains(rules, "c1@eth0") {
		n.Errorf("on the host there is %s:\n%s", got, rules)
	}
}

// TestAttachWithoutItsGuard has the guard fail: nothing is made in the pod, and no record stays.
func TestAttachWithoutItsGuard(t *testing.T) {
	n := newNetwork(t)
	pod := n.namespace()
	n.run("ip link add veth0 type veth peer name eth0 netns " + path(pod))
	n.in(pod, func() { n.run("ip addr add 10.1.0.5/24 dev eth0") })
	// A set of our name with another type, so the transaction is refused.
	n.run("nft add table ip kube2iam-cni\nnft add set ip kube2iam-cni addresses { type inet_service; }")
	node := n.real("nftables")
	node.InPod = true
	_, err := node.Attach(t.Context(), request(pod, "10.1.0.5"))
	if e, ok := errors.AsType[*Error](err); !ok || e.Kind != Rules {
		t.Errorf("got %v, want an error of the rules", err)
	}
	n.in(pod, func() {
		if got := n.ourTables(); got != "" {
			t.Errorf("in the pod there is %s", got)
		}
	})
	if _, err := node.records().Get("c1", "eth0"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("record: %v", err)
	}
}

// TestAttachOnABridge has the mark in the record where iptables does not see the port, and nowhere else.
func TestAttachOnABridge(t *testing.T) {
	for name, tc := range map[string]struct {
		nf4, nf6 string
		ips      []string
		ipRule   string
		iptables uint32 // the mark that is wanted of iptables
		taken    bool   // the mark is the node's
	}{
		"bridge-nf":                      {"1", "1", []string{"10.1.0.5", "fd00:1::5"}, "", 0, false},
		"no bridge-nf":                   {"0", "0", []string{"10.1.0.5", "fd00:1::5"}, "", redirect.DefaultMark, false},
		"bridge-nf of one family of two": {"1", "0", []string{"10.1.0.5", "fd00:1::5"}, "", redirect.DefaultMark, false},
		"bridge-nf of the pod's family":  {"1", "0", []string{"10.1.0.5"}, "", 0, false},
		"bridge-nf of the other family":  {"0", "1", []string{"10.1.0.5"}, "", redirect.DefaultMark, false},
		"bridge-nf, the mark is taken":   {"1", "1", []string{"10.1.0.5"}, "ip rule add fwmark 0x1000/0x1000 lookup 100", 0, false},
		"the mark is taken":              {"0", "0", []string{"10.1.0.5"}, "ip rule add fwmark 0x1000/0x1000 lookup 100", 0, true},
	} {
		t.Run(name, func(t *testing.T) {
			backends(t, func(t *testing.T, backend string) {
				n := newNetwork(t)
				if _, err := os.Stat("/proc/sys/net/bridge"); err != nil {
					t.Skipf("this kernel has no bridge-nf: %v", err)
				}
				pod := n.namespace()
				n.run(`ip link add br0 type bridge
					ip link add veth0 type veth peer name eth0 netns ` + path(pod) + `
					ip link set veth0 master br0
					` + tc.ipRule)
				n.in(pod, func() { n.run("ip addr add 10.1.0.5/24 dev eth0\nip addr add fd00:1::5/64 dev eth0 nodad") })
				n.must(os.WriteFile("/proc/sys/net/bridge/bridge-nf-call-iptables", []byte(tc.nf4), 0o644))
				n.must(os.WriteFile("/proc/sys/net/bridge/bridge-nf-call-ip6tables", []byte(tc.nf6), 0o644))
				node := n.real(backend)
				record, err := node.Attach(t.Context(), request(pod, tc.ips...))
				if tc.taken && backend != "nftables" {
					_, taken := errors.AsType[*hostlink.MarkError](err)
					if e, ok := errors.AsType[*Error](err); !ok || e.Kind != Mark || !taken {
						t.Errorf("got %v, want an error of the mark", err)
					}
					if records, err := node.records().List(); len(records) > 0 || err != nil || n.ourTables() != "" {
						t.Errorf("left %v, %v, %s", records, err, n.ourTables())
					}
					return
				}
				n.must(err)
				want := tc.iptables
				if backend == "nftables" {
					want = 0 // it sees the port itself
				}
				if record.Mark != want || record.Datapath != attachment.DatapathBridged || record.HostLink.Bridge != "br0" {
					t.Errorf("the record says %s, %+v, mark %#x; want mark %#x", record.Datapath, record.HostLink, record.Mark, want)
				}
				if wrong, err := node.Check(request(pod, tc.ips...)); err != nil || len(wrong) > 0 {
					t.Errorf("wrong: %q, %v", wrong, err)
				}
				if kept, err := node.records().Get("c1", "eth0"); err != nil || kept.Mark != want {
					t.Errorf("on record: %v, %v", kept, err)
				}
				n.must(node.Detach(t.Context(), "c1", "eth0"))
				if rules := n.run("nft list ruleset\niptables-nft-save\nip6tables-nft-save\niptables-legacy-save\nip6tables-legacy-save"); strings.Contains(rules, "c1@eth0") {
					t.Errorf("after DEL:\n%s", rules)
				}
			})
		})
	}
}
