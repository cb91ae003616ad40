package redirect

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// guarded4 is a base of IPv4 that guards IPv6 too.
var guarded4 = Base{Metadata: []netip.AddrPort{metadata4}, Guard: true, Guarded: []netip.AddrPort{metadata4, metadata6}}

// guardsOf are the families whose guard stands in nftables.
func (n *namespace) guardsOf() []string {
	n.Helper()
	var families []string
	for _, family := range []string{"ip", "ip6"} {
		if strings.Contains(n.run("nft list ruleset "+family), "reject with tcp reset") {
			families = append(families, family)
		}
	}
	return families
}

// TestGuardOfAllFamilies holds that an ADD of one family guards all of them in nftables, whatever the backend, without a
// process for the other.
func TestGuardOfAllFamilies(t *testing.T) {
	for _, form := range allForms {
		t.Run(string(form), func(t *testing.T) {
			n := newNamespace(t, both...)
			b, err := n.Backend(form)
			n.must(err)
			pod := routed("c1@eth0", "veth0", "10.1.0.5")
			n.must(b.Add(t.Context(), guarded4, pod))
			for _, call := range n.calls() {
				if strings.HasPrefix(call, "ip6tables") {
					t.Error(call)
				}
			}
			if diff := cmp.Diff([]string{"ip", "ip6"}, n.guardsOf()); form != NFTables && diff != "" {
				t.Error(diff)
			}
			n.run("nft delete chain ip6 kube2iam-cni guard")
			missing, err := b.Missing(guarded4, pod)
			n.must(err)
			if diff := cmp.Diff([]string{"guard in table ip6 kube2iam-cni"}, missing); diff != "" {
				t.Error(diff)
			}
			wanted := Wanted{Base: guarded4, Chosen: form, Attachments: map[Form][]Attachment{form: {pod}}}
			did, err := n.Repair(t.Context(), wanted, false)
			n.must(err)
			if diff := cmp.Diff([]string{"missing: guard in table ip6 kube2iam-cni"}, did); diff != "" {
				t.Error(diff)
			}
			if missing, err := b.Missing(guarded4, pod); err != nil || missing != nil {
				t.Errorf("after the repair: %v, %v", missing, err)
			}
		})
	}
}

// TestGuardWithoutPods is a node that has no pods yet: the guard is all that stands.
func TestGuardWithoutPods(t *testing.T) {
	for _, form := range allForms {
		t.Run(string(form), func(t *testing.T) {
			n := newNamespace(t, both...)
			_, err := n.Repair(t.Context(), Wanted{Base: Base{Guard: true, Guarded: guarded4.Guarded}, Chosen: form}, false)
			n.must(err)
			if diff := cmp.Diff([]string{"ip", "ip6"}, n.guardsOf()); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestGuardIsNeverTaken has two configurations of a node that differ: one without the guard takes it from nobody.
func TestGuardIsNeverTaken(t *testing.T) {
	for _, form := range allForms {
		t.Run(string(form), func(t *testing.T) {
			n := newNamespace(t, both...)
			b, err := n.Backend(form)
			n.must(err)
			pods := []Attachment{bridged("c1@eth0", "veth0", "10.1.0.5"), bridged("c2@eth0", "veth1", "10.1.0.6"), bridged("c3@eth0", "veth2", "10.1.0.7")}
			n.must(b.Add(t.Context(), Base{Metadata: guarded4.Metadata}, pods[0]))
			if strings.Contains(n.ruleset(), `"guard"`) {
				t.Errorf("a guard that nobody wanted:\n%s", n.ruleset())
			}
			n.must(b.Add(t.Context(), guarded4, pods[1]))
			guards := strings.Count(n.ruleset(), `"guard"`)
			n.must(b.Add(t.Context(), Base{Metadata: guarded4.Metadata}, pods[2]))
			wanted := Wanted{Base: Base{Metadata: guarded4.Metadata}, Chosen: form, Attachments: map[Form][]Attachment{form: pods}}
			did, err := n.Repair(t.Context(), wanted, false)
			n.must(err)
			if now := strings.Count(n.ruleset(), `"guard"`); guards < 4 || now != guards || len(did) > 0 {
				t.Errorf("%d guards, and then %d; did %q", guards, now, did)
			}
		})
	}
}

// withoutNFTables makes the node's kernel one that has no nftables, and notes what is told to be unguarded. It answers as the
// kernel does: a read with EINVAL, and a batch with EOPNOTSUPP.
func (n *namespace) withoutNFTables() (unguarded *[]netip.AddrPort) {
	n.netlink = []nftables.ConnOption{nftables.WithTestDial(func(request []netlink.Message) ([]netlink.Message, error) {
		if len(request) > 0 && request[0].Header.Type == unix.NFNL_MSG_BATCH_BEGIN {
			return nil, unix.EOPNOTSUPP
		}
		return nil, unix.EINVAL
	})}
	unguarded = new([]netip.AddrPort)
	n.Unguarded = func(service netip.AddrPort, err error) {
		if !errors.Is(err, ErrUnsupported) {
			n.Errorf("unguarded: %v", err)
		}
		*unguarded = append(*unguarded, service)
	}
	return unguarded
}

// TestGuardWithoutNFTables is a kernel without nftables: iptables makes all guards, at ADD and when they are repaired.
func TestGuardWithoutNFTables(t *testing.T) {
	n := newNamespace(t, both...)
	unguarded := n.withoutNFTables()
	pod := bridged("c1@eth0", "veth0", "10.1.0.5")
	b := n.iptables(Legacy)
	n.must(b.Add(t.Context(), guarded4, pod))
	whole := n.rules(Legacy, true)
	for _, want := range append(refusal(metadata6).spec, backstop(metadata6).spec...) {
		if !strings.Contains(whole, want) {
			t.Errorf("no %s in\n%s", want, whole)
		}
	}
	for name, repair := range map[string]func(){
		"ADD":   func() { n.must(b.Add(t.Context(), guarded4, pod)) },
		"agent": func() { n.mustRepair(guarded4, pod) },
		"agent before any pod": func() {
			n.must(n.Remove(Legacy, pod))
			n.mustRepair(Base{Guard: true, Guarded: guarded4.Guarded})
			n.must(b.Add(t.Context(), guarded4, pod))
		},
	} {
		n.run("ip6tables-legacy -F")
		if missing, err := b.Missing(guarded4, pod); err != nil || !cmp.Equal(missing, []string{"guard in filter FORWARD"}) {
			t.Errorf("flushed: %v, %v", missing, err)
		}
		repair()
		if diff := cmp.Diff(whole, n.rules(Legacy, true)); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
	if len(*unguarded) > 0 {
		t.Errorf("told to be unguarded: %v", *unguarded)
	}
}

func (n *namespace) mustRepair(base Base, pods ...Attachment) {
	n.Helper()
	_, err := n.Repair(n.Context(), Wanted{Base: base, Chosen: Legacy, Attachments: map[Form][]Attachment{Legacy: pods}}, false)
	n.must(err)
}

// TestUnguarded is a kernel without nftables on a node without ip6tables: nothing guards IPv6 there, which is said, and no
// reason to leave the pods of IPv4 without their own.
func TestUnguarded(t *testing.T) {
	n := newNamespace(t, "iptables-legacy")
	unguarded := n.withoutNFTables()
	n.must(n.iptables(Legacy).Add(t.Context(), guarded4, routed("c1@eth0", "veth0", "10.1.0.5")))
	n.mustRepair(guarded4, routed("c1@eth0", "veth0", "10.1.0.5"))
	if diff := cmp.Diff([]netip.AddrPort{metadata6, metadata6}, *unguarded, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
		t.Error(diff)
	}
	if missing, err := n.iptables(Legacy).Missing(guarded4, routed("c1@eth0", "veth0", "10.1.0.5")); err != nil || missing != nil {
		t.Errorf("missing %v, %v", missing, err)
	}
}

// noNFTablesStatus is iptables-nft's exit status on such a kernel, and its status where it cannot have the lock.
const noNFTablesStatus = 4

// TestKernelWithoutNFTables is each backend on a kernel without nftables: "auto" takes what works, and a backend that needs
// nftables says so. The guard is iptables-legacy's with all of them, and whatever a record names, its DEL succeeds.
func TestKernelWithoutNFTables(t *testing.T) {
	for backend, works := range map[string]bool{"auto": true, "iptables": false, "iptables-legacy": true, "iptables-nft": false, "nftables": false} {
		t.Run(backend, func(t *testing.T) {
			n := newNamespace(t, both...)
			n.program("iptables", "xtables-nft-multi")
			unguarded := n.withoutNFTables()
			n.fail(noNFTablesStatus, "-nft")
			b, err := n.Choose(backend)
			n.must(err)
			if works && b.Form() != Legacy {
				t.Errorf("chosen %s", b.Form())
			}
			check := func(what string, err error) {
				t.Helper()
				if works && err != nil || !works && (!errors.Is(err, ErrUnsupported) || errors.Is(err, ErrBusy)) {
					t.Errorf("%s: %v", what, err)
				}
			}
			pod := routed("c1@eth0", "veth0", "10.1.0.5")
			if !works {
				_, err = n.Repair(t.Context(), Wanted{Base: Base{Guard: true, Guarded: guarded4.Guarded}, Chosen: b.Form()}, false)
				check("agent", err)
			}
			check("ADD", b.Add(t.Context(), guarded4, pod))
			if works {
				_, err = n.Repair(t.Context(), Wanted{Base: guarded4, Chosen: b.Form(), Attachments: map[Form][]Attachment{b.Form(): {pod}}}, false)
				check("agent", err)
				missing, err := b.Missing(guarded4, pod)
				check("CHECK", err)
				if missing != nil {
					t.Errorf("missing %v", missing)
				}
			}
			for _, m := range guarded4.Guarded {
				rules := n.rules(Legacy, m.Addr().Is6())
				for _, r := range []rule{refusal(m), backstop(m)} {
					if !strings.Contains(rules, "-A "+r.chain+" "+strings.Join(r.spec, " ")) {
						t.Errorf("no %s for %s in\n%s", r, m, rules)
					}
				}
			}
			if len(*unguarded) > 0 && backend != "nftables" {
				t.Errorf("told to be unguarded: %v", *unguarded)
			}
			for _, made := range allForms {
				n.must(n.Remove(made, pod))
				n.must(n.Remove(made, bridged("c2@eth0", "veth1", "10.1.0.6")))
			}
			n.must(n.RemoveLeftovers(pod.ID))
			n.must(n.Clear(t.Context(), guarded4.Guarded))
			if rules := n.rules(Legacy, false); strings.Contains(rules, Comment) || strings.Contains(rules, pod.ID) {
				t.Errorf("left:\n%s", rules)
			}
		})
	}
}

// TestKernelWithoutNFTablesInPods is a redirection inside a pod on such a kernel, which takes nftables.
func TestKernelWithoutNFTablesInPods(t *testing.T) {
	n := newNamespace(t, both...)
	n.withoutNFTables()
	if err := n.Guard(guarded4); !errors.Is(err, ErrUnsupported) {
		t.Errorf("guard: %v", err)
	}
}
