package redirect

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// repairNode is a node with a routed and a bridged pod whose rules are in one form, and the commands of all.
type repairNode struct {
	*namespace
	form   Form
	wanted Wanted
	whole  string // all rules, when nothing is wrong
}

func newRepairNode(t *testing.T, form Form) *repairNode {
	t.Helper()
	n := &repairNode{namespace: newNamespace(t, both...), form: form}
	pods := []Attachment{routed("c1@eth0", "veth0", "10.1.0.5", "fd00:1::5"), bridged("c2@eth0", "veth1", "10.1.0.6", "fd00:1::6")}
	if form != NFTables {
		pods[1].Mark = DefaultMark
	}
	n.wanted = Wanted{Base: baseDual, Chosen: form, Attachments: map[Form][]Attachment{form: pods}}
	for _, a := range pods {
		n.add(form, a)
	}
	n.whole = n.all()
	return n
}

func (n *repairNode) add(form Form, a Attachment) {
	n.Helper()
	b, err := n.Backend(form)
	n.must(err)
	n.must(b.Add(n.Context(), baseDual, a))
}

// all is every rule of the node; those of our chain, whose order says nothing, are in order.
func (n *repairNode) all() string {
	n.Helper()
	lines := strings.Split(n.everything(), "\n")
	for i := 0; i < len(lines); {
		end := i
		for end < len(lines) && strings.HasPrefix(lines[end], "-A "+Chain+" ") {
			end++
		}
		slices.Sort(lines[i:end])
		i = end + 1
	}
	return strings.Join(lines, "\n") + n.ruleset()
}

// command runs one for both families.
func (n *repairNode) command(form Form, args ...string) {
	n.Helper()
	for _, a := range args {
		n.run(string(form) + " " + a)
		n.run(strings.Replace(string(form), "iptables", "ip6tables", 1) + " " + a)
	}
}

// repair asserts what a Repair says that it did, a dry one first, and what stands after.
func (n *repairNode) repair(want []string, after string) {
	n.Helper()
	broken := n.all()
	for _, dry := range []bool{true, false} {
		n.forget()
		did, err := n.Repair(n.Context(), n.wanted, dry)
		n.must(err)
		slices.Sort(did)
		if diff := cmp.Diff(want, did); diff != "" {
			n.Errorf("dry %v, what was done:\n%s", dry, diff)
		}
		if now := n.all(); dry && now != broken {
			n.Errorf("a dry run changed the rules:\n%s", diff(broken, now))
		} else if !dry && now != after {
			n.Errorf("after the repair:\n%s", diff(after, now))
		}
	}
	n.idle("once more")
}

// idle asserts that a Repair finds nothing wrong, changes nothing, and runs one process for each family of its form.
func (n *repairNode) idle(when string) {
	n.Helper()
	n.forget()
	before := n.all()
	n.calls()
	n.transactions(when, 0, func() {
		did, err := n.Repair(n.Context(), n.wanted, false)
		n.must(err)
		if len(did) > 0 {
			n.Errorf("%s: did %q", when, did)
		}
	})
	var runs []string
	if n.form != NFTables {
		runs = []string{string(n.form) + "-save ", strings.Replace(string(n.form), "iptables", "ip6tables", 1) + "-save "}
	}
	if diff := cmp.Diff(runs, trimmed(n.calls())); diff != "" {
		n.Errorf("%s: the processes that were run:\n%s", when, diff)
	}
	if after := n.all(); after != before {
		n.Errorf("%s:\n%s", when, diff(before, after))
	}
}

// trimmed has calls end in the one space that a call without arguments has.
func trimmed(calls []string) []string {
	for i, c := range calls {
		calls[i] = strings.TrimSpace(c) + " "
	}
	return calls
}

func TestRepairOfNothing(t *testing.T) {
	allBackends(t, func(t *testing.T, form Form) {
		newRepairNode(t, form).idle("a repair of nothing")
	})
}

// TestRepairGuardsAnEmptyNode is a node that no pod was ever attached on.
func TestRepairGuardsAnEmptyNode(t *testing.T) {
	allBackends(t, func(t *testing.T, form Form) {
		n := &repairNode{namespace: newNamespace(t, both...), form: form, wanted: Wanted{Base: baseDual, Chosen: form}}
		did, err := n.Repair(t.Context(), n.wanted, false)
		n.must(err)
		if len(did) == 0 {
			t.Error("did nothing")
		}
		want := golden(ipGolden(true, "", ""), inIPv6(ipGolden(true, "", "")))
		if form != NFTables {
			want = ""
			if diff := cmp.Diff(tables(filter4, mangle4), sorted(n.rules(form, false))); diff != "" {
				t.Error(diff)
			}
		}
		n.wantRuleset("after the first repair", want)
		n.idle("once more")
	})
}

// TestRepairEverywhere collects what stands in forms that nothing is wanted in, and makes no table to find it.
func TestRepairEverywhere(t *testing.T) {
	allBackends(t, func(t *testing.T, form Form) {
		for _, elsewhere := range allForms {
			if elsewhere == form {
				continue
			}
			t.Run(string(elsewhere), func(t *testing.T) {
				n := newRepairNode(t, form)
				tables := n.legacyTables()
				n.wanted.Everywhere = true
				if did, err := n.Repair(t.Context(), n.wanted, false); err != nil || len(did) > 0 {
					t.Errorf("nothing is wrong: did %q, %v", did, err)
				}
				if diff := cmp.Diff(tables, n.legacyTables()); diff != "" {
					t.Errorf("made legacy tables:\n%s", diff)
				}

				// The other form's base stays: what hangs on it is not known, and a guard is never removed.
				former := routed("c9@eth0", "veth9", "10.1.0.9", "fd00:1::9")
				n.add(elsewhere, former)
				n.must(n.Remove(elsewhere, former))
				whole := n.all()
				n.add(elsewhere, former)
				n.add(elsewhere, routed("c1@eth0", "veth0", "10.1.0.5"))
				before := n.all()
				if elsewhere != NFTables { // which costs no process, and so is looked at always
					n.wanted.Everywhere = false
					if did, err := n.Repair(t.Context(), n.wanted, false); err != nil || len(did) > 0 || n.all() != before {
						t.Errorf("not everywhere: did %q, %v", did, err)
					}
					n.wanted.Everywhere = true
				}
				did, err := n.Repair(t.Context(), n.wanted, false)
				n.must(err)
				if len(did) != 3 || slices.ContainsFunc(did, func(line string) bool { return !strings.HasPrefix(line, "stale: ") }) {
					t.Errorf("did %q", did)
				}
				if after := n.all(); after != whole {
					t.Errorf("after the repair:\n%s", diff(whole, after))
				}
			})
		}
	})
}

// TestRepairWithoutACommand tells of a form that something is wanted in, and of no other.
func TestRepairWithoutACommand(t *testing.T) {
	forms(t, func(t *testing.T, form Form) {
		n := newNamespace(t, string(other(form)), strings.Replace(string(other(form)), "iptables", "ip6tables", 1))
		w := Wanted{Base: baseDual, Chosen: other(form), Everywhere: true}
		if _, err := n.Repair(t.Context(), w, false); err != nil {
			t.Errorf("nothing is wanted of it: %v", err)
		}
		guarded := n.everything()
		w.Attachments = map[Form][]Attachment{form: {routed("c1@eth0", "veth0", "10.1.0.5")}}
		n.run(string(other(form)) + " -F")
		if _, err := n.Repair(t.Context(), w, false); !errors.Is(err, ErrNoIPTables) {
			t.Errorf("got %v, want %v", err, ErrNoIPTables)
		}
		if after := n.everything(); after != guarded {
			t.Errorf("the rest was not repaired:\n%s", diff(guarded, after))
		}
	})
}

// TestRepairOfManyPods makes the rules of a full node again, those of nftables in one transaction.
func TestRepairOfManyPods(t *testing.T) {
	allBackends(t, func(t *testing.T, form Form) {
		n := newRepairNode(t, form)
		for i := range 300 {
			a := routed(fmt.Sprintf("d%d@eth0", i), fmt.Sprintf("veth%d", 100+i), fmt.Sprintf("10.2.%d.%d", i/100, 1+i%100))
			n.wanted.Attachments[form] = append(n.wanted.Attachments[form], a)
		}
		if form == NFTables {
			n.transactions("the repair", 1, func() { n.fill(t) })
			n.transactions("the repair after a flush", 2, func() { n.run("nft flush ruleset"); n.fill(t) })
		} else {
			n.fill(t)
		}
		n.idle("with 302 pods")
		n.wanted.Attachments[form] = n.wanted.Attachments[form][:2]
		if did, err := n.Repair(t.Context(), n.wanted, false); err != nil || len(did) != 300 {
			t.Errorf("collected %d of 300: %v", len(did), err)
		}
		if after := n.all(); after != n.whole {
			t.Errorf("after the collection:\n%s", diff(n.whole, after))
		}
	})
}

func (n *repairNode) fill(t *testing.T) {
	t.Helper()
	did, err := n.Repair(t.Context(), n.wanted, false)
	n.must(err)
	if len(did) < 300 {
		t.Errorf("did %d things", len(did))
	}
}
