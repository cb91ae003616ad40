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

// TestAddressWithoutDEL gives an address whose DEL never came to the next container, behind a link
// of the same name. A late DEL of the former one removes nothing of the next.
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

// TestNodeRulesComeBack damages the node's rules under an attached pod: the next ADD repairs them
// in one transaction. CHECK reports them.
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
