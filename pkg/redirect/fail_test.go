package redirect

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestAddFails has the kernel, as it were, refuse each kind of call of an ADD. Nothing of the attachment may stand after
// the caller's Remove, and a busy kernel is told from one that refuses.
func TestAddFails(t *testing.T) {
	for name, tc := range map[string]struct {
		status int
		part   string
		busy   bool
	}{
		"the check is refused":            {3, "-C POSTROUTING", false},
		"the check has no lock":           {4, "-C POSTROUTING", true},
		"the append is refused":           {1, "-A KUBE2IAM-CNI", false},
		"the append has no lock":          {4, "-A KUBE2IAM-CNI", true},
		"the second address's is refused": {2, "10.1.0.6", false},
		"the second address has no lock":  {4, "10.1.0.6", true},
	} {
		t.Run(name, func(t *testing.T) {
			forms(t, func(t *testing.T, form Form) {
				n := newNamespace(t, both...)
				n.must(n.iptables(form).Add(t.Context(), base4, routed("c2@eth0", "veth1", "10.1.0.7")))
				before := n.everything()
				a := routed("c1@eth0", "veth0", "10.1.0.5", "10.1.0.6")
				n.fail(tc.status, tc.part)
				err := n.iptables(form).Add(t.Context(), base4, a)
				if err == nil || errors.Is(err, ErrBusy) != tc.busy {
					t.Errorf("got %v, want an error that is busy: %v", err, tc.busy)
				}
				n.fail(0, "")
				n.must(n.Remove(form, a))
				if diff := cmp.Diff(before, n.everything()); diff != "" {
					t.Error(diff)
				}
			})
		})
	}
}

// TestGuardBeforeRedirection stops the making of the base at each of its steps: at none a redirection stands on a node
// that is not guarded.
func TestGuardBeforeRedirection(t *testing.T) {
	forms(t, func(t *testing.T, form Form) {
		for _, step := range []string{"-I FORWARD", "-I POSTROUTING", "-N KUBE2IAM-CNI", "-I PREROUTING", "-E KUBE2IAM-CNI", "-A KUBE2IAM-CNI"} {
			n := newNamespace(t, both...)
			a := routed("c1@eth0", "veth0", "10.1.0.5")
			n.fail(3, step)
			if err := n.iptables(form).Add(t.Context(), base4, a); err == nil {
				t.Errorf("%s: no error", step)
			}
			rules := n.rules(form, false)
			if strings.Contains(rules, "DNAT") || strings.Contains(rules, "-j KUBE2IAM-CNI") && !strings.Contains(rules, "-j DROP") {
				t.Errorf("stopped at %s:\n%s", step, rules)
			}
			n.fail(0, "")
			n.must(n.iptables(form).Add(t.Context(), base4, a))
			if diff := cmp.Diff(tables(filter4, mangle4, nat4, routed4, "COMMIT"), sorted(n.rules(form, false))); diff != "" {
				t.Errorf("after %s: %s", step, diff)
			}
		}
	})
}

// TestGuardComesBackWhole stops the making of a guard that was flushed, on a node that has the chain: the next ADD must
// not take half a guard for a whole one.
func TestGuardComesBackWhole(t *testing.T) {
	forms(t, func(t *testing.T, form Form) {
		for _, step := range []string{"-I FORWARD", "-I POSTROUTING"} {
			n := newNamespace(t, both...)
			a := routed("c1@eth0", "veth0", "10.1.0.5")
			n.must(n.iptables(form).Add(t.Context(), base4, a))
			n.must(n.Remove(form, a))
			n.run(string(form) + " -t mangle -F")
			n.run(string(form) + " -F")
			n.fail(3, step)
			if err := n.iptables(form).Add(t.Context(), base4, a); err == nil {
				t.Errorf("%s: no error", step)
			}
			n.fail(0, "")
			n.must(n.iptables(form).Add(t.Context(), base4, a))
			if diff := cmp.Diff(tables(filter4, mangle4, nat4, routed4, "COMMIT"), sorted(n.rules(form, false))); diff != "" {
				t.Errorf("after %s: %s", step, diff)
			}
		}
	})
}
