package redirect

import (
	"net/netip"
	"testing"
)

// kinds runs a test for a pod behind a veth of its own and one behind a bridge's port.
func kinds(t *testing.T, test func(*testing.T, func(id, link string, sources ...string) Attachment)) {
	t.Run("routed", func(t *testing.T) { test(t, routed) })
	t.Run("bridged", func(t *testing.T) { test(t, bridged) })
}

// standing is the ruleset of a fresh node after the attachments' ADDs.
func standingAfter(t *testing.T, base Base, attachments ...Attachment) (ruleset string) {
	t.Helper()
	// A thread of its own, whose namespace is gone after.
	t.Run("expected", func(t *testing.T) {
		n := newNamespace(t)
		for _, a := range attachments {
			n.must(n.nftables().Add(t.Context(), base, a))
		}
		ruleset = n.ruleset()
	})
	return ruleset
}

// TestNFTablesAddReplaces has an attachment added again: what it had before and has no more goes, in the same transaction.
func TestNFTablesAddReplaces(t *testing.T) {
	kinds(t, func(t *testing.T, kind func(string, string, ...string) Attachment) {
		neighbour := kind("c2@eth0", "veth1", "10.1.0.6", "fd00:1::6")
		elsewhere := kind("c1@eth0", "veth0", "10.1.0.5", "fd00:1::5")
		for i := range elsewhere.Redirections {
			proxy := &elsewhere.Redirections[i].Proxy
			*proxy = netip.AddrPortFrom(proxy.Addr().Next(), 9999)
		}
		for name, again := range map[string]Attachment{
			"another proxy":         elsewhere,
			"another host link":     kind("c1@eth0", "veth7", "10.1.0.5", "fd00:1::5"),
			"another address":       kind("c1@eth0", "veth0", "10.1.0.9", "fd00:1::5"),
			"one address less":      kind("c1@eth0", "veth0", "10.1.0.5"),
			"no address":            kind("c1@eth0", "veth0"),
			"a port becomes routed": routed("c1@eth0", "veth0", "10.1.0.5", "fd00:1::5"),
			"the same":              kind("c1@eth0", "veth0", "10.1.0.5", "fd00:1::5"),
		} {
			t.Run(name, func(t *testing.T) {
				want := standingAfter(t, baseDual, neighbour, again)
				n := newNamespace(t)
				n.must(n.nftables().Add(t.Context(), baseDual, neighbour))
				n.must(n.nftables().Add(t.Context(), baseDual, kind("c1@eth0", "veth0", "10.1.0.5", "fd00:1::5")))
				changes := uint32(1)
				if n.ruleset() == want {
					changes = 0
				}
				n.transactions("the second ADD", changes, func() { n.must(n.nftables().Add(t.Context(), baseDual, again)) })
				n.wantRuleset("after it", want)
			})
		}
	})
}

// TestNFTablesTakeover gives an address whose DEL never came to the next container, behind an interface of the same name.
func TestNFTablesTakeover(t *testing.T) {
	kinds(t, func(t *testing.T, kind func(string, string, ...string) Attachment) {
		former := kind("c1@eth0", "veth0", "10.1.0.5", "10.1.0.8", "fd00:1::5")
		newcomer := kind("c9@eth0", "veth0", "10.1.0.5", "fd00:1::5")
		without := standingAfter(t, baseDual, newcomer)

		n := newNamespace(t)
		n.must(n.nftables().Add(t.Context(), baseDual, former))
		n.transactions("the newcomer's ADD", 1, func() { n.must(n.nftables().Add(t.Context(), baseDual, newcomer)) })
		missing, err := n.nftables().Missing(baseDual, newcomer)
		n.must(err)
		if len(missing) > 0 {
			t.Errorf("the newcomer lacks %v", missing)
		}

		n.transactions("the former's late DEL", 1, func() { n.must(n.Remove(NFTables, former)) })
		n.wantRuleset("after the former's late DEL", without)
		n.transactions("a DEL more", 0, func() {
			n.must(n.Remove(NFTables, former))
			n.must(n.RemoveLeftovers(former.ID))
		})
		n.wantRuleset("after DELs of an attachment that has nothing", without)
	})
}

// TestNFTablesRemove leaves what is the node's.
func TestNFTablesRemove(t *testing.T) {
	kinds(t, func(t *testing.T, kind func(string, string, ...string) Attachment) {
		for name, remove := range map[string]func(*namespace, Attachment) error{
			"by its record": func(n *namespace, a Attachment) error { return n.Remove(NFTables, a) },
			"by another form's": func(n *namespace, a Attachment) error {
				for _, command := range both {
					n.command(command)
				}
				return n.Remove(NFT, a)
			},
			"by its identity": func(n *namespace, a Attachment) error { return n.RemoveLeftovers(a.ID) },
			"by a record of little": func(n *namespace, a Attachment) error {
				a.Redirections = a.Redirections[:1]
				return n.Remove(NFTables, a)
			},
		} {
			t.Run(name, func(t *testing.T) {
				base, lookalikes := kind("c3@eth0", "veth3"), []Attachment{
					kind("c11@eth0", "veth1", "10.1.0.6", "fd00:1::6"), kind("C1@eth0", "veth2", "10.1.0.7"), kind("c1@eth01", "veth4", "10.1.0.8"),
				}
				n := newNamespace(t)
				a := kind("c1@eth0", "veth0", "10.1.0.5", "fd00:1::5")
				n.must(n.nftables().Add(t.Context(), baseDual, base))
				bare := n.ruleset()
				n.must(n.nftables().Add(t.Context(), baseDual, a))
				n.transactions("DEL", 1, func() { n.must(remove(n, a)) })
				n.wantRuleset("after the only one's DEL", bare)

				for _, l := range lookalikes {
					n.must(n.nftables().Add(t.Context(), baseDual, l))
				}
				before := n.ruleset()
				n.must(n.nftables().Add(t.Context(), baseDual, a))
				n.forget()
				n.transactions("DEL", 1, func() { n.must(remove(n, a)) })
				n.wantRuleset("after the DEL of one of many", before)
			})
		}
	})
}
