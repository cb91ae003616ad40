package attach

import (
	"errors"
	"io/fs"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/test/netnstest"
	"github.com/kube2iam-cni/kube2iam-cni/test/testhost"
)

// ownTables returns the plugin's nftables tables in a namespace.
func ownTables(n *netnstest.Netns) string {
	var ours []string
	for line := range strings.Lines(n.Run("nft list tables")) {
		if strings.HasSuffix(strings.TrimSpace(line), " kube2iam-cni") {
			ours = append(ours, strings.TrimSpace(line))
		}
	}
	return strings.Join(ours, ", ")
}

// TestAttachInsideThePod has interfaces whose packets the host's rules do not see, on a node of
// each backend.
func TestAttachInsideThePod(t *testing.T) {
	for name, build := range map[string]func(host, pod *netnstest.Netns){
		"a macvlan": func(host, pod *netnstest.Netns) {
			host.IP("link add uplink type veth peer name far", "link set uplink up",
				"link add eth0 netns "+pod.Path()+" link uplink type macvlan mode bridge")
		},
		"a veth to another pod": func(host, pod *netnstest.Netns) {
			netnstest.New(t).Veth("veth0", pod, "eth0")
		},
	} {
		t.Run(name, func(t *testing.T) {
			testhost.Backends(t, func(t *testing.T, backend string) {
				host := newHost(t)
				pod := netnstest.New(t)
				build(host, pod)
				pod.IP("addr add 10.1.0.5/24 dev eth0", "addr add fd00:1::5/64 dev eth0 nodad")
				node, r := realNode(t, backend), request(pod, "10.1.0.5", "fd00:1::5")
				_, err := node.Attach(t.Context(), r)
				if name != "a macvlan" {
					// It is a veth: that its host side is not here may be a fault, and the pod's being
					// elsewhere is not taken for granted.
					if e, ok := errors.AsType[*Error](err); !ok || e.Kind != KindLink {
						t.Fatalf("got %v, want an error of the interface", err)
					}
					node.PodDatapath = true
					_, err = node.Attach(t.Context(), r)
				}
				must(t, err)
				record, err := node.Records.Get("c1", "eth0")
				must(t, err)
				if record.Datapath != attachment.DatapathPod || record.Backend != attachment.BackendNFTables || record.HostLink != (attachment.HostLink{}) {
					t.Errorf("the record says %s, %s, %+v", record.Datapath, record.Backend, record.HostLink)
				}
				wantGuardOnly(t, host)
				if got, want := ownTables(pod), "table ip kube2iam-cni, table ip6 kube2iam-cni"; got != want {
					t.Errorf("in the pod there is %q, want %q", got, want)
				}
				check := func(want ...string) {
					t.Helper()
					wrong, err := node.Check(t.Context(), r)
					must(t, err)
					if diff := cmp.Diff(want, wrong); diff != "" {
						t.Error(diff)
					}
				}
				check()
				host.Run("nft delete chain ip6 kube2iam-cni guard")
				check("missing: rules of chain guard of table ip6 kube2iam-cni")
				_, err = node.Rules.MakeGuard(t.Context())
				must(t, err)
				pod.Run("nft flush map ip kube2iam-cni pod")
				check("missing: redirection of 10.1.0.5 to 192.168.7.2:8181 of c1@eth0 in set pod of table ip kube2iam-cni")
				must(t, node.Detach(t.Context(), "c1", "eth0"))
				if rules := pod.Run("nft list ruleset"); strings.Contains(rules, "c1@eth0") {
					t.Errorf("after DEL:\n%s", rules)
				}
				check("no record")
			})
		})
	}
}

// TestAttachInsideThePodByConfiguration has a veth whose packets the host's rules would see.
func TestAttachInsideThePodByConfiguration(t *testing.T) {
	host := newHost(t)
	pod := netnstest.New(t)
	host.Veth("veth0", pod, "eth0")
	pod.IP("addr add 10.1.0.5/24 dev eth0")
	node := realNode(t, "nftables")
	node.PodDatapath = true
	record, err := node.Attach(t.Context(), request(pod, "10.1.0.5"))
	must(t, err)
	// The host's side is on record: by it the agent knows whether the pod is there.
	if record.Datapath != attachment.DatapathPod || record.HostLink.Name != "veth0" || record.HostLink.Index == 0 {
		t.Errorf("the record says %s, %+v", record.Datapath, record.HostLink)
	}
	wantGuardOnly(t, host)
}

// wantGuardOnly wants the guard of both families on the host, and no pod.
func wantGuardOnly(t *testing.T, host *netnstest.Netns) {
	t.Helper()
	rules := host.Run("nft list ruleset")
	if got, want := ownTables(host), "table ip kube2iam-cni, table ip6 kube2iam-cni"; got != want || strings.Count(rules, `drop comment "drop"`) != 4 || strings.Contains(rules, "c1@eth0") {
		t.Errorf("on the host there is %s:\n%s", got, rules)
	}
}

// TestAttachWithoutItsGuard has the guard fail: nothing is made in the pod, and no record stays.
func TestAttachWithoutItsGuard(t *testing.T) {
	host := newHost(t)
	pod := netnstest.New(t)
	host.Veth("veth0", pod, "eth0")
	pod.IP("addr add 10.1.0.5/24 dev eth0")
	// A set of our name with another type, so the transaction is refused.
	host.NFT("table ip kube2iam-cni { set addresses { type inet_service; }; }")
	node := realNode(t, "nftables")
	node.PodDatapath = true
	_, err := node.Attach(t.Context(), request(pod, "10.1.0.5"))
	if e, ok := errors.AsType[*Error](err); !ok || e.Kind != KindRules {
		t.Errorf("got %v, want an error of the rules", err)
	}
	if got := ownTables(pod); got != "" {
		t.Errorf("in the pod there is %s", got)
	}
	if _, err := node.Records.Get("c1", "eth0"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("record: %v", err)
	}
}

// TestAttachOnABridge attaches a bridged pod with and without bridge-nf, which iptables needs to
// see the port.
func TestAttachOnABridge(t *testing.T) {
	for name, tc := range map[string]struct {
		nf4, nf6  string
		ips       []string
		isRefused bool // with iptables
	}{
		"bridge-nf":                      {"1", "1", []string{"10.1.0.5", "fd00:1::5"}, false},
		"no bridge-nf":                   {"0", "0", []string{"10.1.0.5", "fd00:1::5"}, true},
		"bridge-nf of one family of two": {"1", "0", []string{"10.1.0.5", "fd00:1::5"}, true},
		"bridge-nf of the pod's family":  {"1", "0", []string{"10.1.0.5"}, false},
		"bridge-nf of the other family":  {"0", "1", []string{"10.1.0.5"}, true},
	} {
		t.Run(name, func(t *testing.T) {
			testhost.Backends(t, func(t *testing.T, backend string) {
				host := newHost(t)
				if _, err := os.Stat("/proc/sys/net/bridge"); err != nil {
					t.Skipf("this kernel has no bridge-nf: %v", err)
				}
				pod := netnstest.New(t)
				host.IP("link add br0 type bridge", "link add veth0 type veth peer name eth0 netns "+pod.Path(), "link set veth0 master br0 up",
					"addr add 10.1.0.1/24 dev br0", "addr add fd00:1::1/64 dev br0 nodad", "link set br0 up")
				// In a user namespace filters cannot be listed, so a packet shows what netfilter sees.
				pod.IP("addr add 10.1.0.5/24 dev eth0", "addr add fd00:1::5/64 dev eth0 nodad", "link set eth0 up",
					"route add default via 10.1.0.1", "route add default via fd00:1::1")
				host.Sysctl("net/bridge/bridge-nf-call-iptables", tc.nf4)
				host.Sysctl("net/bridge/bridge-nf-call-ip6tables", tc.nf6)
				node := realNode(t, backend)
				record, err := node.Attach(t.Context(), request(pod, tc.ips...))
				if tc.isRefused && backend == "iptables" {
					if e, ok := errors.AsType[*Error](err); !ok || e.Kind != KindBridge {
						t.Errorf("got %v, want an error of the bridge", err)
					}
					if records, err := node.Records.List(); len(records) > 0 || err != nil || ownTables(host) != "" {
						t.Errorf("left %v, %v, %s", records, err, ownTables(host))
					}
					return
				}
				must(t, err)
				if record.Datapath != attachment.DatapathBridged || record.HostLink.Bridge != "br0" || record.Backend != attachment.Backend(backend) {
					t.Errorf("the record says %s, %+v, %s", record.Datapath, record.HostLink, record.Backend)
				}
				if differences, err := node.Check(t.Context(), request(pod, tc.ips...)); err != nil || len(differences) > 0 {
					t.Errorf("differences: %q, %v", differences, err)
				}
				if _, err := node.Records.Get("c1", "eth0"); err != nil {
					t.Errorf("on record: %v", err)
				}
				must(t, node.Detach(t.Context(), "c1", "eth0"))
				if rules := host.Run("nft list ruleset; iptables-save; ip6tables-save"); strings.Contains(rules, "c1@eth0") {
					t.Errorf("after DEL:\n%s", rules)
				}
			})
		})
	}
}
