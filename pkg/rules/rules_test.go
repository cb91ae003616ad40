package rules

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/nft"
)

type newRecord func(container, link string, ips ...string) *attachment.Record

// forEachDatapath runs a test with routed and with bridged pods.
func forEachDatapath(t *testing.T, test func(*testing.T, newRecord)) {
	t.Run("routed", func(t *testing.T) { test(t, routed) })
	t.Run("bridged", func(t *testing.T) { test(t, bridged) })
}

// rulesetOf returns the ruleset of a new host after the ADDs of records.
func rulesetOf(t *testing.T, records ...*attachment.Record) (ruleset string) {
	t.Helper()
	t.Run("expected", func(t *testing.T) { // on a thread of its own, whose namespace ends with it
		h := newHost(t)
		for _, r := range records {
			h.must(h.Attach(t.Context(), r, nil))
		}
		ruleset = h.ruleset()
	})
	return ruleset
}

func (h *host) wantRuleset(when, want string) {
	h.Helper()
	if diff := cmp.Diff(want, h.ruleset()); diff != "" {
		h.Errorf("%s (-want +got):\n%s", when, diff)
	}
}

func TestAttachRemovesWhatTheFormerRecordHadBesides(t *testing.T) {
	forEachDatapath(t, func(t *testing.T, pod newRecord) {
		neighbour := pod("c2", "veth1", "10.1.0.6", "fd00:1::6")
		otherProxy := pod("c1", "veth0", "10.1.0.5", "fd00:1::5")
		for i, redirect := range otherProxy.Redirects {
			otherProxy.Redirects[i].Proxy = netip.AddrPortFrom(redirect.Proxy.Addr().Next(), 9999)
		}
		for name, again := range map[string]*attachment.Record{
			"another proxy":         otherProxy,
			"another host link":     pod("c1", "veth7", "10.1.0.5", "fd00:1::5"),
			"another address":       pod("c1", "veth0", "10.1.0.9", "fd00:1::5"),
			"one address less":      pod("c1", "veth0", "10.1.0.5"),
			"a port becomes routed": routed("c1", "veth0", "10.1.0.5", "fd00:1::5"),
			"the same":              pod("c1", "veth0", "10.1.0.5", "fd00:1::5"),
		} {
			t.Run(name, func(t *testing.T) {
				want := rulesetOf(t, neighbour, again)
				h := newHost(t)
				former := pod("c1", "veth0", "10.1.0.5", "fd00:1::5")
				h.must(h.Attach(t.Context(), neighbour, nil))
				h.must(h.Attach(t.Context(), former, nil))
				transactions := uint32(1)
				if cmp.Equal(former.Redirects, again.Redirects, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b }),
					cmp.Comparer(func(a, b netip.Addr) bool { return a == b })) && former.HostLink == again.HostLink && former.Datapath == again.Datapath {
					transactions = 0
				}
				h.wantTransactions("the second ADD", transactions, func() { h.must(h.Attach(t.Context(), again, former)) })
				got := h.ruleset()
				if again.Datapath != neighbour.Datapath || len(again.Redirects) < 2 {
					want, got = elementsOnly(want), elementsOnly(got) // chains stay
				}
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("after it (-want +got):\n%s", diff)
				}
			})
		}
	})
}

// elementsOnly returns the lines of a ruleset that name an attachment.
func elementsOnly(ruleset string) string {
	var lines []string
	for line := range strings.Lines(ruleset) {
		if strings.Contains(line, "@eth0") {
			lines = append(lines, line)
		}
	}
	slices.Sort(lines)
	return strings.Join(lines, "")
}

// TestAddressWithoutDEL gives an address whose DEL never came to the next container, behind a link of
// the same name. A late DEL of the former one removes nothing of the next.
func TestAddressWithoutDEL(t *testing.T) {
	forEachDatapath(t, func(t *testing.T, pod newRecord) {
		former := pod("c1", "veth0", "10.1.0.5", "10.1.0.8", "fd00:1::5")
		next := pod("c9", "veth0", "10.1.0.5", "fd00:1::5")
		want := rulesetOf(t, next)
		h := newHost(t)
		h.must(h.Attach(t.Context(), former, nil))
		h.wantTransactions("the next ADD", 1, func() { h.must(h.Attach(t.Context(), next, nil)) })
		if changes, err := h.Check(t.Context(), next); err != nil || len(changes) > 0 {
			t.Errorf("Check of the next: %v, %v", changes, err)
		}
		h.wantTransactions("the late DEL", 1, func() { h.must(h.Detach(t.Context(), former)) })
		h.wantRuleset("after the late DEL", want)
		h.wantTransactions("DELs of what is gone", 0, func() {
			h.must(h.Detach(t.Context(), former))
			h.must(h.detachID(former.ID()))
		})
		h.wantRuleset("after DELs of what is gone", want)
	})
}

func TestDetachLeavesOtherAttachments(t *testing.T) {
	forEachDatapath(t, func(t *testing.T, pod newRecord) {
		for name, detach := range map[string]func(*host, *attachment.Record) error{
			"by its record": func(h *host, r *attachment.Record) error { return h.Detach(t.Context(), r) },
			"by its ID":     func(h *host, r *attachment.Record) error { return h.detachID(r.ID()) },
		} {
			t.Run(name, func(t *testing.T) {
				h := newHost(t)
				for i, container := range []string{"c11", "C1", "c1x"} {
					h.must(h.Attach(t.Context(), pod(container, fmt.Sprint("veth", 1+i), fmt.Sprint("10.1.0.", 6+i), fmt.Sprint("fd00:1::", 6+i)), nil))
				}
				before := h.ruleset()
				r := pod("c1", "veth0", "10.1.0.5", "fd00:1::5")
				h.must(h.Attach(t.Context(), r, nil))
				h.Close() // as another process
				h.wantTransactions("DEL", 1, func() { h.must(detach(h, r)) })
				h.wantRuleset("after DEL", before)
			})
		}
	})
}

// TestNodeRulesComeBack damages the node's rules under an attached pod: the next ADD repairs them in
// one transaction. CHECK reports them.
func TestNodeRulesComeBack(t *testing.T) {
	first, second := bridged("c1", "veth0", "10.1.0.5", "fd00:1::5"), bridged("c2", "veth1", "10.1.0.6", "fd00:1::6")
	want := rulesetOf(t, first, second)
	for name, tc := range map[string]struct{ damage, missing string }{
		"the rules of a family":        {"flush table ip kube2iam-cni", "rules of chain guard of table ip kube2iam-cni"},
		"a dormant table":              {"add table ip kube2iam-cni { flags dormant; }", "rules of chain guard of table ip kube2iam-cni"},
		"a flushed chain":              {"flush chain ip6 kube2iam-cni guard", "rules of chain guard of table ip6 kube2iam-cni"},
		"a policy":                     {"chain ip kube2iam-cni redirections { policy drop; }", "rules of chain redirections of table ip kube2iam-cni"},
		"a deleted chain":              {"delete chain ip kube2iam-cni guard", "rules of chain guard of table ip kube2iam-cni"},
		"a flushed second guard":       {"flush chain ip6 kube2iam-cni guard-postrouting", "rules of chain guard-postrouting of table ip6 kube2iam-cni"},
		"a rule before the guard":      {"insert rule ip kube2iam-cni guard accept", "rules of chain guard of table ip kube2iam-cni"},
		"a rule after the guard":       {"add rule bridge kube2iam-cni guard accept", "rules of chain guard of table bridge kube2iam-cni"},
		"a rule twice":                 {"add rule ip kube2iam-cni guard drop comment \"drop\"", "rules of chain guard of table ip kube2iam-cni"},
		"the bridge's rules":           {"flush table bridge kube2iam-cni", "rules of chain prerouting of table bridge kube2iam-cni"},
		"the metadata service":         {"flush set ip kube2iam-cni metadata", "169.254.169.254:80 of kube2iam-cni in set metadata of table ip kube2iam-cni"},
		"the guard's address":          {"flush set ip kube2iam-cni addresses", "169.254.169.254 of kube2iam-cni in set addresses of table ip kube2iam-cni"},
		"the bridge's service":         {"flush set bridge kube2iam-cni metadata6", "[fd00:ec2::254]:80 of kube2iam-cni in set metadata6 of table bridge kube2iam-cni"},
		"a rule with the same comment": {"flush chain ip kube2iam-cni guard; add rule ip kube2iam-cni guard accept comment \"drop\"", "rules of chain guard of table ip kube2iam-cni"},
		"a chain without a hook": {"delete chain ip kube2iam-cni guard; add chain ip kube2iam-cni guard; add rule ip kube2iam-cni guard ip daddr @addresses drop comment \"drop\"",
			"rules of chain guard of table ip kube2iam-cni"},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			h.must(h.Attach(t.Context(), first, nil))
			h.nftScript(tc.damage)
			changes, err := h.Check(t.Context(), first)
			h.must(err)
			if !slices.Contains(changeStrings(changes), "missing: "+tc.missing) {
				t.Errorf("Check returned %q, want %q among them", changes, tc.missing)
			}
			h.wantTransactions("the next ADD", 1, func() { h.must(h.Attach(t.Context(), second, nil)) })
			h.wantRuleset("after the next ADD", want)
		})
	}
}

func (h *host) nftScript(script string) {
	h.Helper()
	file := filepath.Join(h.TempDir(), "script.nft")
	h.must(os.WriteFile(file, []byte(script), 0o600))
	h.run("nft -f " + file)
}

// pods are a routed and a bridged pod of both IP families.
func pods() []*attachment.Record {
	return []*attachment.Record{routed("c1", "veth0", "10.1.0.5", "fd00:1::5"), bridged("c2", "veth1", "10.1.0.6", "fd00:1::6")}
}

// TestReconcile damages the rules of two pods. A dry run returns the changes and makes none; then one
// transaction repairs all.
func TestReconcile(t *testing.T) {
	for name, tc := range map[string]struct {
		damage string
		want   []string // the changes, or some of them where there are more than three
	}{
		"a flush of everything": {"flush ruleset", []string{
			"missing: rules of chain guard of table ip kube2iam-cni", "missing: rules of chain prerouting of table bridge kube2iam-cni",
			"missing: redirection of 10.1.0.5 to 192.168.7.2:8181 of c1@eth0 in set routed of table ip kube2iam-cni",
			"missing: binding of 10.1.0.6 to veth1 of c2@eth0 in set bound4 of table bridge kube2iam-cni"}},
		"a deleted table": {"delete table ip kube2iam-cni", []string{"missing: rules of chain redirections of table ip kube2iam-cni"}},
		"a deleted redirection": {"delete element ip kube2iam-cni routed { veth0 . 10.1.0.5 }", []string{
			"missing: redirection of 10.1.0.5 to 192.168.7.2:8181 of c1@eth0 in set routed of table ip kube2iam-cni"}},
		"a deleted binding": {"flush set bridge kube2iam-cni ports6", []string{
			"missing: binding of fd00:1::6 to veth1 of c2@eth0 in set ports6 of table bridge kube2iam-cni"}},
		"a redirection elsewhere": {`delete element ip kube2iam-cni routed { veth0 . 10.1.0.5 }
			add element ip kube2iam-cni routed { veth0 . 10.1.0.5 comment "c1@eth0" : 192.168.7.3 . 8181 }`, []string{
			"stale: entry of c1@eth0 in set routed of table ip kube2iam-cni",
			"missing: redirection of 10.1.0.5 to 192.168.7.2:8181 of c1@eth0 in set routed of table ip kube2iam-cni"}},
		"a redirection of another": {`delete element ip kube2iam-cni bridged { 10.1.0.6 }
			add element ip kube2iam-cni bridged { 10.1.0.6 comment "c9@eth0" : 192.168.7.2 . 8181 }`, []string{
			"stale: entry of c9@eth0 in set bridged of table ip kube2iam-cni",
			"missing: redirection of 10.1.0.6 to 192.168.7.2:8181 of c2@eth0 in set bridged of table ip kube2iam-cni"}},
		"a pod without a record": {`add element ip kube2iam-cni routed { veth9 . 10.1.0.9 comment "c9@eth0" : 192.168.7.2 . 8181 }`, []string{
			"stale: entry of c9@eth0 in set routed of table ip kube2iam-cni"}},
		"a table of a killed probe": {"add table bridge " + nft.ProbePrefix + "1", []string{"stale: table bridge " + nft.ProbePrefix + "1"}},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			for _, r := range pods() {
				h.must(h.Attach(t.Context(), r, nil))
			}
			whole := h.ruleset()
			h.nftScript(tc.damage)
			damaged := h.ruleset()
			for _, dryRun := range []bool{true, false} {
				changes, err := h.Reconcile(t.Context(), pods(), attachment.BackendNFTables, dryRun)
				h.must(err)
				got := changeStrings(changes)
				if missing := slices.DeleteFunc(slices.Clone(tc.want), func(c string) bool { return slices.Contains(got, c) }); len(missing) > 0 {
					t.Errorf("dryRun %v: no %q in %q", dryRun, missing, got)
				}
				if len(got) <= 3 && len(got) != len(tc.want) {
					t.Errorf("dryRun %v: got %q, want %q", dryRun, got, tc.want)
				}
				if dryRun {
					h.wantRuleset("after a dry run", damaged)
				}
			}
			h.wantRuleset("after Reconcile", whole)
			h.wantTransactions("a second Reconcile", 0, func() {
				changes, err := h.Reconcile(t.Context(), pods(), attachment.BackendNFTables, false)
				h.must(err)
				if len(changes) > 0 {
					t.Errorf("a second Reconcile: %v", changes)
				}
			})
		})
	}
}

// TestReconcileOfManyPods makes the rules of a full node in one transaction, and removes them in one.
func TestReconcileOfManyPods(t *testing.T) {
	h := newHost(t)
	records := pods()
	_, err := h.Reconcile(t.Context(), records, attachment.BackendNFTables, false)
	h.must(err)
	whole := h.ruleset()
	for i := range 300 {
		records = append(records, routed(fmt.Sprint("d", i), fmt.Sprint("veth", 100+i), fmt.Sprintf("10.2.%d.%d", i/100, 1+i%100)))
	}
	for _, count := range []int{302, 2} {
		h.wantTransactions("Reconcile", 1, func() {
			changes, err := h.Reconcile(t.Context(), records[:count], attachment.BackendNFTables, false)
			h.must(err)
			if len(changes) != 300 {
				t.Errorf("%d changes, want 300", len(changes))
			}
		})
	}
	h.wantRuleset("in the end", whole)
}

// TestReconcileOfAThousandBridgedPods makes all their rules in one transaction, with the longest names.
func TestReconcileOfAThousandBridgedPods(t *testing.T) {
	h := newHost(t)
	var records []*attachment.Record
	for i := range 1000 {
		container := strings.Repeat("c", 60) + fmt.Sprintf("%04d", i)
		records = append(records, bridged(container, fmt.Sprintf("veth%011d", i), fmt.Sprintf("10.2.%d.%d", i/200, 1+i%200), fmt.Sprintf("fd00:2::%x", 1+i)))
	}
	h.wantTransactions("Reconcile", 1, func() {
		_, err := h.Reconcile(t.Context(), records, attachment.BackendNFTables, false)
		h.must(err)
	})
	changes, err := h.Reconcile(t.Context(), records, attachment.BackendNFTables, true)
	h.must(err)
	if len(changes) > 0 {
		t.Errorf("%d changes after Reconcile, the first: %s", len(changes), changes[0])
	}
}

// TestReconcileLeavesOtherOwners has elements of other owners in the maps: only those of attachments
// are removed.
func TestReconcileLeavesOtherOwners(t *testing.T) {
	h := newHost(t)
	_, err := h.Reconcile(t.Context(), pods(), attachment.BackendNFTables, false)
	h.must(err)
	h.nftScript(`add element ip kube2iam-cni routed { veth8 . 10.1.0.8 : 192.168.7.2 . 8181, veth9 . 10.1.0.9 comment "other" : 192.168.7.2 . 8181 }`)
	before := h.ruleset()
	_, err = h.Reconcile(t.Context(), pods(), attachment.BackendNFTables, false)
	h.must(err)
	h.wantRuleset("after Reconcile", before)
}

// TestGuardIsNeverRemoved has two network configurations on one node: the one without the guard does
// not remove that of the other.
func TestGuardIsNeverRemoved(t *testing.T) {
	h := newHost(t)
	h.Guard = false
	h.must(h.Attach(t.Context(), bridged("c1", "veth0", "10.1.0.5"), nil))
	if strings.Contains(h.ruleset(), "chain guard") {
		t.Error("a guard without the setting")
	}
	h.Guard = true
	h.must(h.Attach(t.Context(), bridged("c2", "veth1", "10.1.0.6"), nil))
	guards := strings.Count(h.ruleset(), "chain guard")
	h.Guard = false
	h.must(h.Attach(t.Context(), bridged("c3", "veth2", "10.1.0.7"), nil))
	_, err := h.Reconcile(t.Context(), []*attachment.Record{bridged("c3", "veth2", "10.1.0.7")}, attachment.BackendNFTables, false)
	h.must(err)
	if now := strings.Count(h.ruleset(), "chain guard"); guards != 5 || now != guards {
		t.Errorf("%d guard chains, then %d; want 5", guards, now)
	}
}

// foreignTables are other programs' tables with names and comments like ours.
const foreignTables = `
table inet firewall {
	set kube2iam-cni { type ipv4_addr; elements = { 10.1.0.5 comment "c1@eth0" } }
	chain forward {
		type filter hook forward priority filter; policy accept;
		ip daddr 169.254.169.254 tcp dport 80 accept comment "c1@eth0"
	}
}
table ip kube-proxy {
	map routed { type ifname . ipv4_addr : ipv4_addr . inet_service; elements = { "veth0" . 10.1.0.5 comment "c1@eth0" : 192.168.7.2 . 8181 } }
	chain redirections { type nat hook prerouting priority dstnat; policy accept; }
}
table ip6 kube-proxy {
	chain redirections { type nat hook prerouting priority dstnat; policy accept; }
}
table bridge firewall {
	set bound4 { type ipv4_addr; elements = { 10.1.0.5 comment "c1@eth0", 10.1.0.6 comment "c2@eth0" } }
	chain prerouting {
		type filter hook prerouting priority -350; policy accept;
		ip saddr @bound4 meta mark set 0x1000 comment "own address, mark 0x1000"
	}
}
`

// foreignRules adds rules of other programs to every table of iptables.
func (h *host) foreignRules() {
	h.Helper()
	h.nftScript(foreignTables)
	for _, command := range []string{"iptables", "ip6tables"} {
		for _, rule := range []string{"-t filter -A FORWARD -j ACCEPT", "-t mangle -A POSTROUTING -j ACCEPT",
			"-t nat -A PREROUTING -p tcp --dport 80 -m comment --comment mine -j ACCEPT", "-t nat -N KUBE-SERVICES", "-t nat -A PREROUTING -j KUBE-SERVICES"} {
			h.run(command + " " + rule)
		}
	}
}

// foreign returns all rules of other programs.
func (h *host) foreign() string {
	h.Helper()
	var lines []string
	for _, line := range strings.Split(h.run("nft list ruleset; iptables-save; ip6tables-save"), "\n") {
		if !strings.HasPrefix(line, "#") && !strings.HasPrefix(line, ":") && !strings.Contains(line, IPTablesChain) {
			lines = append(lines, line)
		}
	}
	all := strings.Join(lines, "\n")
	for _, family := range []string{"ip", "ip6", "bridge"} {
		if start := strings.Index(all, "table "+family+" "+Table+" {"); start >= 0 {
			end := strings.Index(all[start:], "\n}\n")
			all = all[:start] + all[start+end+len("\n}\n"):]
		}
	}
	return all
}

func TestForeignRulesStay(t *testing.T) {
	h := newHost(t)
	h.foreignRules()
	before := h.foreign()
	unchanged := func(when string) {
		t.Helper()
		if diff := cmp.Diff(before, h.foreign()); diff != "" {
			t.Errorf("%s (-before +after):\n%s", when, diff)
		}
	}
	for _, r := range pods() {
		h.must(h.Attach(t.Context(), r, nil))
		unchanged("after ADD of " + r.ID())
	}
	_, err := h.Reconcile(t.Context(), pods()[:1], attachment.BackendNFTables, false)
	h.must(err)
	unchanged("after Reconcile")
	h.must(h.Detach(t.Context(), pods()[0]))
	h.must(h.detachID("c1@eth0"))
	unchanged("after DEL")
	h.nftScript("add table bridge " + nft.ProbePrefix + "1")
	h.must(h.Uninstall(t.Context()))
	unchanged("after Uninstall")
	if rest := h.run("nft list tables"); strings.Contains(rest, Table) {
		t.Errorf("Uninstall left %s", rest)
	}
	h.must(h.Uninstall(t.Context()))
}

// TestRulesetCanBeSaved loads what nft(8) lists, as distributions do at boot.
func TestRulesetCanBeSaved(t *testing.T) {
	h := newHost(t)
	_, err := h.Reconcile(t.Context(), pods(), attachment.BackendNFTables, false)
	h.must(err)
	before := h.ruleset()
	saved := filepath.Join(t.TempDir(), "saved.nft")
	h.run("nft list ruleset >" + saved + " && nft flush ruleset && nft -f " + saved)
	h.wantRuleset("after a reload", before)
}

func TestUninstallLeavesNothing(t *testing.T) {
	h := newHost(t)
	for _, r := range pods() {
		h.must(h.Attach(t.Context(), r, nil))
	}
	h.must(h.Uninstall(t.Context()))
	h.wantRuleset("after Uninstall", "")
	h.wantTransactions("Uninstall of nothing", 0, func() { h.must(h.Uninstall(t.Context())) })
}
