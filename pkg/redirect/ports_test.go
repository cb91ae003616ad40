package redirect

import (
	"strings"
	"testing"
)

const (
	ipOnlyUnmark = "table ip kube2iam-cni {\n" + ipUnmark + "}\n"
	marked4      = `-A KUBE2IAM-CNI -s 10.1.0.6/32 -d 169.254.169.254/32 -p tcp -m mark --mark 0x1000/0x1000 -m tcp --dport 80 -m comment --comment "c2@eth0" -j DNAT --to-destination 192.168.7.2:8181`
	physdev4     = bridged4
)

// TestPortsByIPTables has an iptables pod on a bridge: its rule sees the port, or the mark that the bridge's table sets there.
func TestPortsByIPTables(t *testing.T) {
	forms(t, func(t *testing.T, form Form) {
		for name, tc := range map[string]struct {
			mark  uint32
			guard bool
			rule  string
		}{
			"by the port":           {0, true, physdev4},
			"by the mark":           {DefaultMark, true, marked4},
			"by the mark, no guard": {DefaultMark, false, marked4},
		} {
			t.Run(name, func(t *testing.T) {
				n := newNamespace(t, both...)
				a := bridged("c2@eth0", "veth1", "10.1.0.6")
				a.Mark = tc.mark
				base := base4
				base.Guard = tc.guard
				rules := tables(filter4, mangle4, nat4, tc.rule, "COMMIT")
				if !tc.guard {
					rules = tables(nat4, tc.rule, "COMMIT")
				}
				for _, when := range []string{"after ADD", "after the same ADD"} {
					n.forget()
					n.must(n.iptables(form).Add(t.Context(), base, a))
					n.wantRuleset(when, golden(c2Ports4.table(tc.guard), ipOnlyUnmark))
					if when == "after ADD" {
						if got := sorted(n.rules(form, false)); got != rules {
							t.Errorf("%s:\n%s", when, diff(rules, got))
						}
					}
				}
				missing, err := n.iptables(form).Missing(base, a)
				n.must(err)
				if len(missing) > 0 {
					t.Errorf("missing: %v", missing)
				}
				n.must(n.Remove(form, a))
				n.must(n.Remove(form, a)) // the second rule of two ADDs without a record in between
				n.wantRuleset("after DEL", golden(portsGolden{}.table(tc.guard), ipOnlyUnmark))
				rules = strings.Replace(rules, tc.rule+"\n", "", 1)
				if got := sorted(n.rules(form, false)); got != rules {
					t.Errorf("after DEL:\n%s", diff(rules, got))
				}
			})
		}
	})
}

// TestPortsAreEverybodys has pods of two forms on one bridge, as after a change of the configuration.
func TestPortsAreEverybodys(t *testing.T) {
	forms(t, func(t *testing.T, form Form) {
		n := newNamespace(t, both...)
		n.must(n.nftables().Add(t.Context(), base4, bridged("c2@eth0", "veth1", "10.1.0.6")))
		before := n.ruleset()
		a := bridged("c1@eth0", "veth0", "10.1.0.5")
		a.Mark = DefaultMark
		n.must(n.iptables(form).Add(t.Context(), base4, a))
		both := portsGolden{
			holders4: elements(`"veth0" . 10.1.0.5 comment "c1@eth0"`, `"veth1" . 10.1.0.6 comment "c2@eth0"`),
			held4:    elements(`10.1.0.5 comment "c1@eth0"`, `10.1.0.6 comment "c2@eth0"`),
		}
		n.wantRuleset("with both", golden(both.table(true), ipGolden(true, "", elements(c2Bridged))))
		n.must(n.Remove(form, a))
		n.wantRuleset("without the one of iptables", before)
	})
}

// TestMissingPorts tells a pod of iptables what its bridge lacks.
func TestMissingPorts(t *testing.T) {
	for name, tc := range map[string]struct {
		break_ string
		want   []string
	}{
		"nothing": {"list ruleset", nil},
		"the port's address": {"delete element bridge kube2iam-cni holders4 { veth1 . 10.1.0.6 }",
			[]string{"entry of c2@eth0 by veth1 from 10.1.0.6 in holders4 of table bridge kube2iam-cni"}},
		"the address's holder": {"delete element bridge kube2iam-cni held4 { 10.1.0.6 }",
			[]string{"entry of c2@eth0 from 10.1.0.6 in held4 of table bridge kube2iam-cni"}},
		"the service": {"delete element bridge kube2iam-cni metadata4 { 169.254.169.254 . 80 }",
			[]string{"entry of kube2iam-cni from 169.254.169.254 in metadata4 of table bridge kube2iam-cni"}},
		"a chain's rules": {"flush chain bridge kube2iam-cni pass", []string{"pass in table bridge kube2iam-cni"}},
		"the mark's end":  {"delete table ip kube2iam-cni", []string{"unmark in table ip kube2iam-cni"}},
		"one rule of them": {"insert rule bridge kube2iam-cni leave accept",
			[]string{"leave in table bridge kube2iam-cni"}},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNamespace(t, both...)
			a := bridged("c2@eth0", "veth1", "10.1.0.6")
			a.Mark = DefaultMark
			n.must(n.iptables(NFT).Add(t.Context(), base4, a))
			n.run("nft " + tc.break_)
			before := n.everything() + n.ruleset()
			missing, err := n.iptables(NFT).Missing(base4, a)
			n.must(err)
			if d := strings.Join(missing, "\n"); d != strings.Join(tc.want, "\n") {
				t.Errorf("got %v, want %v", missing, tc.want)
			}
			if after := n.everything() + n.ruleset(); after != before {
				t.Errorf("asking changed the rules:\n%s", diff(before, after))
			}
		})
	}
}
