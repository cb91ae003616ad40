package redirect

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func other(form Form) Form {
	if form == NFT {
		return Legacy
	}
	return NFT
}

// TestRemoveLooksInTheOtherForm has a record that names the wrong form, as after a node's default has changed.
func TestRemoveLooksInTheOtherForm(t *testing.T) {
	forms(t, func(t *testing.T, form Form) {
		n := newNamespace(t, both...)
		a := routed("c1@eth0", "veth0", "10.1.0.5", "fd00:1::5")
		n.must(n.iptables(form).Add(t.Context(), baseDual, routed("c2@eth0", "veth1", "10.1.0.6", "fd00:1::6")))
		n.must(n.iptables(other(form)).Add(t.Context(), baseDual, routed("c2@eth0", "veth1", "10.1.0.6", "fd00:1::6")))
		before := n.everything()
		n.must(n.iptables(form).Add(t.Context(), baseDual, a))
		n.forget()
		n.must(n.Remove(other(form), a))
		if diff := cmp.Diff(before, n.everything()); diff != "" {
			t.Error(diff)
		}
	})
}

// TestRemoveLooksInBothForms has one address's rule in each.
func TestRemoveLooksInBothForms(t *testing.T) {
	n := newNamespace(t, both...)
	n.must(n.iptables(NFT).Add(t.Context(), base4, routed("c1@eth0", "veth0", "10.1.0.5")))
	n.must(n.iptables(Legacy).Add(t.Context(), base4, routed("c1@eth0", "veth0", "10.1.0.6")))
	n.must(n.Remove(NFT, routed("c1@eth0", "veth0", "10.1.0.5", "10.1.0.6")))
	if rules := n.everything(); strings.Contains(rules, "DNAT") {
		t.Errorf("got\n%s", rules)
	}
}

// TestTeardownMakesNothing is a node where nothing of ours ever was.
func TestTeardownMakesNothing(t *testing.T) {
	forms(t, func(t *testing.T, form Form) {
		n := newNamespace(t, both...)
		n.must(n.Remove(form, bridged("c1@eth0", "veth0", "10.1.0.5", "fd00:1::5")))
		n.must(n.RemoveLeftovers("c1@eth0"))
		if got := n.legacyTables() + n.run("nft list ruleset"); got != "" {
			t.Errorf("got %s", got)
		}
	})
}

func TestRemoveLeftovers(t *testing.T) {
	n := newNamespace(t, both...)
	for _, form := range []Form{NFT, Legacy} {
		foreign(n, form)
		n.must(n.iptables(form).Add(t.Context(), baseDual, routed("c11@eth0", "veth1", "10.1.0.6", "fd00:1::6")))
		for _, lookalike := range []string{
			"-A KUBE2IAM-CNI -s 10.1.0.9/32",
			"-A KUBE2IAM-CNI -s 10.1.0.9/32 -m comment --comment c1",
			"-A KUBE2IAM-CNI -s 10.1.0.9/32 -m comment --comment C1@eth0",
			"-A KUBE2IAM-CNI -s 10.1.0.9/32 -m comment --comment c1@eth0-",
		} {
			n.run(string(form) + " -t nat " + lookalike)
		}
	}
	before := n.everything()
	for _, form := range []Form{NFT, Legacy} {
		n.must(n.iptables(form).Add(t.Context(), baseDual, routed("c1@eth0", "veth0", "10.1.0.5", "fd00:1::5")))
		n.must(n.iptables(form).Add(t.Context(), baseDual, bridged("c1@eth0", "veth2", "10.1.0.7", "fd00:1::7")))
		// The same rule twice is what an ADD makes that finds no record of the one before.
		n.must(n.iptables(form).Add(t.Context(), baseDual, bridged("c1@eth0", "veth2", "10.1.0.7")))
	}
	n.forget()
	n.must(n.RemoveLeftovers("c1@eth0"))
	if diff := cmp.Diff(before, n.everything()); diff != "" {
		t.Error(diff)
	}
}

func TestRemoveLeftoversOfABusyNode(t *testing.T) {
	n := newNamespace(t, both...)
	n.must(n.iptables(NFT).Add(t.Context(), base4, routed("c1@eth0", "veth0", "10.1.0.5")))
	for _, part := range []string{"-S KUBE2IAM-CNI", "-D KUBE2IAM-CNI"} {
		n.fail(4, part)
		if err := n.RemoveLeftovers("c1@eth0"); !errors.Is(err, ErrBusy) {
			t.Errorf("%s: got %v, want %v", part, err, ErrBusy)
		}
	}
}

// TestRemoveSaysWhatItLeaves is a rule that stands and cannot be deleted: the caller must not forget it.
func TestRemoveSaysWhatItLeaves(t *testing.T) {
	forms(t, func(t *testing.T, form Form) {
		n := newNamespace(t, both...)
		a := routed("c1@eth0", "veth0", "10.1.0.5", "10.1.0.6")
		n.must(n.iptables(form).Add(t.Context(), base4, a))
		n.fail(1, "-D KUBE2IAM-CNI -s 10.1.0.5/32")
		if err := n.Remove(form, a); err == nil || errors.Is(err, ErrBusy) || !strings.Contains(err.Error(), "10.1.0.5") {
			t.Errorf("got %v, want an error that names 10.1.0.5", err)
		}
		n.fail(0, "")
		if rules := n.rules(form, false); !strings.Contains(rules, "10.1.0.5") || strings.Contains(rules, "10.1.0.6") {
			t.Errorf("want the rule of 10.1.0.5 only:\n%s", rules)
		}
		n.must(os.Remove(filepath.Join(n.dir, string(form))))
		n.forget()
		if err := n.Remove(form, a); !errors.Is(err, ErrNoIPTables) {
			t.Errorf("without its command: got %v, want %v", err, ErrNoIPTables)
		}
	})
}
