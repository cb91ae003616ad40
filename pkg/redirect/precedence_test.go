package redirect

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// preRouting is the nat table's PREROUTING of a family, a rule each.
func (n *repairNode) preRouting(v6 bool) []string {
	n.Helper()
	var rules []string
	for line := range strings.Lines(n.run(n.inFamily(v6) + " -t nat -S PREROUTING")) {
		if rule, ok := strings.CutPrefix(strings.TrimSpace(line), "-A PREROUTING "); ok {
			rules = append(rules, rule)
		}
	}
	return rules
}

// inFamily is the command of the node's form.
func (n *repairNode) inFamily(v6 bool) string {
	if v6 {
		return strings.Replace(string(n.form), "iptables", "ip6tables", 1)
	}
	return string(n.form)
}

// conflicts are what Node.Conflict was told since the last question.
func (n *repairNode) conflicts() func() []string {
	var told []string
	n.forget()
	n.Conflict = func(what string) { told = append(told, what) }
	return func() []string {
		all := told
		told = nil
		return all
	}
}

// TestJumpIsKeptFirst has other programs' rules inserted above the jump and below it.
func TestJumpIsKeptFirst(t *testing.T) {
	forms(t, func(t *testing.T, form Form) {
		for _, v6 := range []bool{false, true} {
			n := newRepairNode(t, form)
			conflicts := n.conflicts()
			pod := n.wanted.Attachments[form][0]
			ours := n.preRouting(v6)
			if len(ours) != 1 {
				t.Fatalf("PREROUTING holds %q", ours)
			}
			n.sh(n.inFamily(v6) + ` -t nat -I PREROUTING -m comment --comment "kubernetes service portals" -j RETURN`)
			n.run(n.inFamily(v6) + " -t nat -A PREROUTING -p udp -j ACCEPT")
			const above = `first place of the jump to KUBE2IAM-CNI, above it: -m comment --comment "kubernetes service portals" -j RETURN`
			missing, err := n.iptables(form).Missing(baseDual, pod)
			n.must(err)
			if diff := cmp.Diff([]string{above}, missing); diff != "" {
				t.Errorf("CHECK (-want +got):\n%s", diff)
			}
			for _, dry := range []bool{true, false} {
				did, err := n.Repair(t.Context(), n.wanted, dry)
				n.must(err)
				if diff := cmp.Diff(says(form, "missing: "+above), did); diff != "" {
					t.Errorf("dry %v (-want +got):\n%s", dry, diff)
				}
			}
			want := []string{ours[0], `-m comment --comment "kubernetes service portals" -j RETURN`, "-p udp -j ACCEPT"}
			if diff := cmp.Diff(want, n.preRouting(v6)); diff != "" {
				t.Errorf("PREROUTING (-want +got):\n%s", diff)
			}
			did, err := n.Repair(t.Context(), n.wanted, false)
			n.must(err)
			if missing, err := n.iptables(form).Missing(baseDual, pod); err != nil || len(missing)+len(did)+len(conflicts()) > 0 {
				t.Errorf("afterwards: CHECK %q, %v, did %q", missing, err, did)
			}
		}
	})
}

// TestJumpIsNotFoughtOver has a program that puts its rule first whenever the jump is: it wins until the window has passed.
func TestJumpIsNotFoughtOver(t *testing.T) {
	forms(t, func(t *testing.T, form Form) {
		n := newRepairNode(t, form)
		now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
		n.now = func() time.Time { return now }
		conflicts := n.conflicts()
		rounds := func(count int) (moves int, told []string) {
			t.Helper()
			for range count {
				n.run(string(form) + " -t nat -I PREROUTING -p tcp -j RETURN")
				for _, dry := range []bool{true, false} {
					did, err := n.Repair(t.Context(), n.wanted, dry)
					n.must(err)
					if !dry {
						moves += len(did)
					}
				}
				told = append(told, conflicts()...)
				now = now.Add(time.Second)
			}
			slices.Sort(told)
			return moves, slices.Compact(told)
		}
		if moves, told := rounds(mostMoves); moves != mostMoves || len(told) > 0 {
			t.Errorf("%d moves in the first %d rounds, told of %q", moves, mostMoves, told)
		}
		if moves, told := rounds(3); moves != 0 || len(told) != 1 || !strings.HasSuffix(told[0], ": -p tcp -j RETURN") {
			t.Errorf("%d moves then, told of %q, want one conflict", moves, told)
		}
		now = now.Add(moveWindow)
		if moves, told := rounds(1); moves != 1 || len(told) > 0 {
			t.Errorf("%d moves when the window has passed, told of %q", moves, told)
		}
	})
}

// TestJumpIsKeptFirstUnlisted is TestJumpIsKeptFirst for a table that iptables-nft does not list.
func TestJumpIsKeptFirstUnlisted(t *testing.T) {
	n := newRepairNode(t, NFT)
	n.hide()
	n.run("iptables-nft -t nat -I PREROUTING -p tcp -j RETURN")
	missing, err := n.iptables(NFT).Missing(baseDual, n.wanted.Attachments[NFT][0])
	if err != nil || len(missing) != 1 || !strings.HasPrefix(missing[0], "first place of the jump to KUBE2IAM-CNI") {
		t.Errorf("CHECK: %q, %v", missing, err)
	}
	did, err := n.Repair(t.Context(), n.wanted, false)
	if err != nil || len(did) != 1 {
		t.Errorf("did %q, %v", did, err)
	}
	n.shown()
	if rules := n.preRouting(false); len(rules) != 2 || !strings.HasSuffix(rules[0], "-j "+Chain) {
		t.Errorf("PREROUTING holds %q", rules)
	}
}

// TestEarlierNATChains tells NAT chains that may run before that of iptables from those that do not.
func TestEarlierNATChains(t *testing.T) {
	forms(t, func(t *testing.T, form Form) {
		n := newRepairNode(t, form)
		conflicts := n.conflicts()
		n.nft(`
table ip others {
	chain empty { type nat hook prerouting priority dstnat; }
	chain later { type nat hook prerouting priority -99; tcp dport 1 accept; }
	chain out { type nat hook output priority -100; tcp dport 1 accept; }
	chain filtering { type filter hook prerouting priority dstnat; tcp dport 1 accept; }
	chain regular { tcp dport 1 accept; }
	chain same { type nat hook prerouting priority dstnat; tcp dport 1 accept; }
	chain lower { type nat hook prerouting priority -150; tcp dport 1 accept; }
}
table ip6 others6 { chain same { type nat hook prerouting priority dstnat; tcp dport 1 accept; }; }
table inet both { chain same { type nat hook prerouting priority dstnat; tcp dport 1 accept; }; }
table ip kube2iam-cni { chain redirections { type nat hook prerouting priority -110; tcp dport 1 accept; }; }
`)
		other, its := Legacy, []string{"chain PREROUTING of iptables-legacy", "chain PREROUTING of ip6tables-legacy"}
		if form == Legacy {
			other, its = NFT, []string{"chain PREROUTING of table ip nat", "chain PREROUTING of table ip6 nat"}
		}
		n.command(other, "-t nat -A PREROUTING -p tcp --dport 1 -j ACCEPT")
		want := append([]string{"chain same of table ip others", "chain lower of table ip others", "chain same of table ip6 others6",
			"chain same of table inet both", "chain same of table inet both"}, its...)
		slices.Sort(want)
		missing, err := n.iptables(form).Missing(baseDual, n.wanted.Attachments[form][0])
		n.must(err)
		did, err := n.Repair(t.Context(), n.wanted, false)
		n.must(err)
		if len(did) > 0 {
			t.Errorf("did %q", did)
		}
		for prefix, got := range map[string][]string{"precedence over the NAT ": missing, "NAT ": conflicts()} {
			for i := range got {
				got[i] = strings.TrimPrefix(got[i], prefix)
			}
			slices.Sort(got)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%q (-want +got):\n%s", prefix, diff)
			}
		}
	})
}
