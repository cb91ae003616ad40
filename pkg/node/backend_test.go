package node

import (
	"strings"
	"testing"
)

// TestAutoKeepsRulesOfIPTables is a node whose pods were attached with iptables, before its backend
// became "auto". Their rules stay in iptables, and are repaired there, until the pods end; new pods
// are redirected by nftables.
func TestAutoKeepsRulesOfIPTables(t *testing.T) {
	for _, form := range []string{"iptables-nft", "iptables-legacy"} {
		t.Run(form, func(t *testing.T) {
			b := newBed(t, form)
			old := b.attached(b.pod("old", 7, "10.1.0.5", "fd00:1::5"))
			b.round()
			wantCheck := func(when string, r Request) {
				t.Helper()
				if wrong, err := b.Check(r); err != nil || len(wrong) > 0 {
					t.Errorf("%s, CHECK of %s: %q, %v", when, r.ContainerID, wrong, err)
				}
			}
			redirections := func(by string) (count int) {
				for line := range strings.Lines(b.allRules()) {
					if strings.Contains(line, by) && strings.Contains(line, "old@eth0") {
						count++
					}
				}
				return count
			}

			b.Backend = "auto"
			b.round()
			b.idle("with another backend")
			wantCheck("with another backend", old)
			if n := redirections(form) + redirections(strings.Replace(form, "iptables", "ip6tables", 1)); n != 2 {
				t.Errorf("%d redirections in %s, want 2:\n%s", n, form, b.allRules())
			}

			b.attached(b.pod("new", 8, "10.1.0.6"))
			record, err := b.records().Get("new", "eth0")
			b.must(err)
			if record.Backend != "nftables" {
				t.Errorf("a new pod's rules are in %s", record.Backend)
			}
			before := b.allRules()
			b.run(form + " -t nat -F KUBE2IAM-CNI")
			wantCheck("after a flush", b.pod("new", 8, "10.1.0.6"))
			b.round()
			if after := b.allRules(); after != before {
				t.Errorf("repaired:\n%s\nwant\n%s", after, before)
			}
			b.must(b.Detach(t.Context(), "old", "eth0"))
			if rules := b.allRules(); strings.Contains(rules, "old@eth0") || !strings.Contains(rules, "new@eth0") {
				t.Errorf("after its DEL:\n%s", rules)
			}
			b.log()
			b.idle("after its DEL")
		})
	}
}
