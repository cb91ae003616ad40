package redirect

import (
	"errors"
	"strings"
	"testing"
)

func TestRefusedNames(t *testing.T) {
	for _, a := range []Attachment{
		routed("c1@eth0", "cali+", "10.1.0.5"),
		routed("c1@eth0", "-x", "10.1.0.5"),
		routed("c1@eth0", "!x", "10.1.0.5"),
		routed("c1@eth0", "", "10.1.0.5"),
		routed("", "veth0", "10.1.0.5"),
		routed("c 1@eth0", "veth0", "10.1.0.5"),
		routed(`c"1@eth0`, "veth0", "10.1.0.5"),
		routed(strings.Repeat("c", 256), "veth0", "10.1.0.5"),
	} {
		n := &Node{Dirs: []string{t.TempDir()}}
		ipt := &IPTables{form: NFT, find: n.find}
		if err := ipt.Add(t.Context(), base4, a); err == nil || errors.Is(err, ErrNoIPTables) {
			t.Errorf("%q at %q: got %v, want an error that names it", a.ID, a.HostLink, err)
		}
	}
}

// TestLongestIdentity is the longest that a record can have.
func TestLongestIdentity(t *testing.T) {
	forms(t, func(t *testing.T, form Form) {
		n := newNamespace(t, both...)
		a := routed(strings.Repeat("c", 200)+"@"+strings.Repeat("e", 15), strings.Repeat("v", 15), "10.1.0.5")
		n.must(n.iptables(form).Add(t.Context(), base4, a))
		before := n.rules(form, false)
		n.must(n.RemoveLeftovers(a.ID))
		if after := n.rules(form, false); before == after || strings.Contains(after, "DNAT") {
			t.Errorf("got\n%s", after)
		}
	})
}

func TestNoCommandAtAll(t *testing.T) {
	n := &Node{Dirs: []string{t.TempDir()}}
	for _, backend := range []string{"iptables", "iptables-nft", "iptables-legacy", ""} {
		if _, err := n.Choose(backend); !errors.Is(err, ErrNoIPTables) {
			t.Errorf("Choose(%q): got %v, want %v", backend, err, ErrNoIPTables)
		}
	}
	a := routed("c1@eth0", "veth0", "10.1.0.5")
	if err := n.Remove(NFT, a); !errors.Is(err, ErrNoIPTables) {
		t.Errorf("Remove: got %v, want %v: rules may stand", err, ErrNoIPTables)
	}
	if err := n.Remove("ipvs", a); !errors.Is(err, ErrNoIPTables) {
		t.Errorf("Remove of an unknown form: got %v, want %v: rules may stand", err, ErrNoIPTables)
	}
	if err := n.RemoveLeftovers("c1@eth0"); err != nil {
		t.Errorf("RemoveLeftovers: %v", err)
	}
}
