package redirect

import (
	"net/netip"
	"os"
	"path/filepath"
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

// TestJumpIsNotFoughtOver has a program that puts its rule first whenever the jump is: it wins until the agent restarts. The
// other family, and other rules, are not affected.
func TestJumpIsNotFoughtOver(t *testing.T) {
	forms(t, func(t *testing.T, form Form) {
		n := newRepairNode(t, form)
		now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
		n.now = func() time.Time { return now }
		conflicts := n.conflicts()
		rounds := func(count int, v6 bool, rule string) (moves int, told []string) {
			t.Helper()
			for range count {
				n.run(n.inFamily(v6) + " -t nat -I PREROUTING " + rule)
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
		const rule = "-p tcp -j RETURN"
		wantMoves := func(when string, v6 bool, rule string, conflicts int) {
			t.Helper()
			if moves, told := rounds(mostMoves, v6, rule); moves != mostMoves || len(told) != conflicts {
				t.Errorf("%s: %d moves in %d rounds, told of %q, want %d conflicts", when, moves, mostMoves, told, conflicts)
			}
		}
		wantConceded := func(when string, rule string) {
			t.Helper()
			if moves, told := rounds(3, false, rule); moves != 0 || len(told) != 1 || !strings.HasSuffix(told[0], ": "+rule) {
				t.Errorf("%s: %d moves, told of %q, want one conflict", when, moves, told)
			}
		}
		wantMoves("at first", false, rule, 0)
		wantConceded("then", rule)
		wantMoves("in the other family", true, rule, 1) // which is that of the first
		now = now.Add(moveWindow)
		wantConceded("when the window has passed", rule)
		wantMoves("another rule", false, "-j ACCEPT", 0)
		wantConceded("then", "-j ACCEPT")
		now = now.Add(moveWindow)
		n.forget()
		wantMoves("after a restart", false, rule, 0)
	})
}

// felix is what Calico's Felix writes for a node with one floating IP. It inserts its jump above all other rules, and again
// whenever it finds another rule there.
const felix = `*nat
:cali-PREROUTING - [0:0]
:cali-fip-dnat - [0:0]
-I PREROUTING -m comment --comment "cali:6gwbT8clXdHdC1b1" -j cali-PREROUTING
-A cali-PREROUTING -m comment --comment "cali:r6XmIziWUJsdOK6Z" -j cali-fip-dnat
-A cali-fip-dnat -d 10.65.0.1/32 -m comment --comment "cali:vp0BNYqjFRGpEGDO" -j DNAT --to-destination 10.1.0.9
COMMIT
`

// restore adds rules in iptables-restore's words.
func (n *repairNode) restore(rules string) {
	n.Helper()
	file := filepath.Join(n.TempDir(), "rules")
	n.must(os.WriteFile(file, []byte(rules), 0o600))
	n.run(string(n.form) + "-restore --noflush " + file)
}

// TestHarmlessRulesStayAboveTheJump has Felix's rules first. No one moves the jump over them, and CHECK does not report them,
// until the address of the service becomes a floating IP.
func TestHarmlessRulesStayAboveTheJump(t *testing.T) {
	forms(t, func(t *testing.T, form Form) {
		n := newRepairNode(t, form)
		conflicts := n.conflicts()
		n.restore(felix)
		before := n.preRouting(false)
		pod := routed("c3@eth0", "veth3", "10.1.0.8")
		n.wanted.Attachments[form] = append(n.wanted.Attachments[form], pod)
		n.must(n.iptables(form).Add(t.Context(), baseDual, pod))
		did, err := n.Repair(t.Context(), n.wanted, false)
		n.must(err)
		missing, err := n.iptables(form).Missing(baseDual, pod)
		n.must(err)
		if told := conflicts(); len(did)+len(missing)+len(told) > 0 {
			t.Errorf("did %q, CHECK %q, told of %q", did, missing, told)
		}
		if diff := cmp.Diff(before, n.preRouting(false)); diff != "" {
			t.Errorf("PREROUTING (-want +got):\n%s", diff)
		}

		n.run(string(form) + " -t nat -A cali-fip-dnat -d 169.254.169.254/32 -j DNAT --to-destination 10.1.0.9")
		missing, err = n.iptables(form).Missing(baseDual, pod)
		n.must(err)
		if len(missing) != 1 || !strings.HasSuffix(missing[0], "-j cali-PREROUTING") {
			t.Errorf("CHECK %q, want it to report Felix's jump", missing)
		}
	})
}

// TestAddPutsTheJumpFirst holds that a CHECK right after an ADD, as CRI-O makes it, reports no rule above the jump.
func TestAddPutsTheJumpFirst(t *testing.T) {
	forms(t, func(t *testing.T, form Form) {
		for _, v6 := range []bool{false, true} {
			n := newRepairNode(t, form)
			ours := n.preRouting(v6)
			n.run(n.inFamily(v6) + " -t nat -I PREROUTING -p tcp -j RETURN")
			pod := routed("c3@eth0", "veth3", "10.1.0.8", "fd00:1::8")
			n.must(n.iptables(form).Add(t.Context(), baseDual, pod))
			if missing, err := n.iptables(form).Missing(baseDual, pod); err != nil || len(missing) > 0 {
				t.Errorf("CHECK %q, %v", missing, err)
			}
			if diff := cmp.Diff(append(ours, "-p tcp -j RETURN"), n.preRouting(v6)); diff != "" {
				t.Errorf("PREROUTING (-want +got):\n%s", diff)
			}
		}
	})
}

// TestAddThenCheck is what CRI-O does with the default backend, beside rules of other programs that stand at prerouting.
func TestAddThenCheck(t *testing.T) {
	n := &repairNode{namespace: newNamespace(t, both...), form: NFT}
	n.restore(felix)
	n.nft(`table ip kube-proxy {
	chain services { }
	chain nat-prerouting { type nat hook prerouting priority dstnat; jump services; }
}`)
	n.run("iptables-legacy -t nat -A PREROUTING -j ACCEPT")
	b, err := n.Choose("auto")
	n.must(err)
	pod := routed("c1@eth0", "veth0", "10.1.0.5")
	n.must(b.Add(t.Context(), guarded4, pod))
	if missing, err := b.Missing(guarded4, pod); err != nil || len(missing) > 0 {
		t.Errorf("CHECK %q, %v", missing, err)
	}
}

// TestTwoMetadataIPs has two configurations of a node that differ in metadataIP, whose jumps stand in one chain.
func TestTwoMetadataIPs(t *testing.T) {
	forms(t, func(t *testing.T, form Form) {
		for _, hidden := range []bool{false, form == NFT} {
			n := newRepairNode(t, form)
			conflicts := n.conflicts()
			other := netip.MustParseAddrPort("169.254.170.2:80")
			pod := Attachment{ID: "c3@eth0", HostLink: "veth3", Redirections: []Redirection{{netip.MustParseAddr("10.1.0.8"), other, proxy4}}}
			base := Base{Metadata: []netip.AddrPort{other}, Guard: true}
			n.must(n.iptables(form).Add(t.Context(), base, pod))
			n.wanted.Attachments[form] = append(n.wanted.Attachments[form], pod)
			if hidden {
				n.hide()
			}
			for _, check := range []struct {
				base Base
				pod  Attachment
			}{{base, pod}, {baseDual, n.wanted.Attachments[form][0]}} {
				if missing, err := n.iptables(form).Missing(check.base, check.pod); err != nil || len(missing) > 0 {
					t.Errorf("hidden %v, CHECK of %s: %q, %v", hidden, check.pod.ID, missing, err)
				}
			}
			did, err := n.Repair(t.Context(), n.wanted, false)
			if told := conflicts(); err != nil || len(did)+len(told) > 0 {
				t.Errorf("hidden %v: did %q, told of %q, %v", hidden, did, told, err)
			}
		}
	})
}

// TestRulesThatCanTake is each part of a rule that decides whether a request can end its way there.
func TestRulesThatCanTake(t *testing.T) {
	s := &saved{nat: map[string][]string{
		"EMPTY":     nil,
		"NODEPORTS": {`-p tcp -m comment --comment "ns/web -d 10.0.0.1/32" -m tcp --dport 30080 -j DNAT --to-destination 10.1.0.9:80`},
		"SERVICES":  {"-d 10.96.0.1/32 -p tcp -m tcp --dport 443 -j EMPTY", "-m addrtype --dst-type LOCAL -j NODEPORTS", "-j RETURN"},
		"DEEP":      {"-j SERVICES", "-j DEEPER"},
		"DEEPER":    {"-j SERVICES", "-p tcp -m tcp --dport 80 -j REDIRECT --to-ports 8000"},
	}}
	for spec, want := range map[string]bool{
		"":                                       false,
		"-j ACCEPT":                              true,
		"-j RETURN":                              true,
		"-j DROP":                                true,
		"-j DNAT --to-destination 10.1.0.9":      true,
		"-j UNKNOWN":                             true,
		"-j MARK --set-xmark 0x4000/0x4000":      false,
		`-j LOG --log-prefix "-j ACCEPT "`:       false,
		"-j EMPTY":                               false,
		"-g EMPTY":                               true,
		"-j SERVICES":                            false,
		"-j DEEP":                                true,
		"-d 10.65.0.1/32 -j DEEP":                false,
		"-j KUBE2IAM-CNI":                        false,
		"-d 169.254.0.0/16 -j ACCEPT":            true,
		"-d 169.254.0.0/255.255.0.255 -j ACCEPT": true,
		"! -d 169.254.169.254/32 -j ACCEPT":      false,
		"! -d 10.0.0.0/8 -j ACCEPT":              true,
		"-p udp -j ACCEPT":                       false,
		"! -p udp -j ACCEPT":                     true,
		"! -p tcp -j ACCEPT":                     false,
		"-p tcp -m tcp --dport 443 -j ACCEPT":    false,
		"-p tcp -m tcp ! --dport 443 -j ACCEPT":  true,
		"-p tcp -m tcp ! --dport 80 -j ACCEPT":   false,
		"-p tcp -m tcp --dport 1:100 -j ACCEPT":  true,
		"-p tcp -m tcp --dport 81:100 -j ACCEPT": false,
		"-p tcp -m multiport --dports 79,81:90 -j ACCEPT":      false,
		"-p tcp -m multiport --dports 443,80 -j ACCEPT":        true,
		"-p tcp -m multiport ! --dports http -j ACCEPT":        true,
		"-m set --match-set vips dst,dst -j ACCEPT":            true,
		`-m comment --comment "for -d 10.0.0.1/32" -j ACCEPT`:  true,
		`-m comment --comment "a \"quoted\" -p udp" -j ACCEPT`: true,
		"-m comment --comment -d -j ACCEPT":                    true,
	} {
		if got := s.canTake(metadata4, "PREROUTING", spec, make(map[string]bool)); got != want {
			t.Errorf("%q can take a request: %v, want %v", spec, got, want)
		}
	}
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
