package redirect

import "testing"

// TestRulesetCanBeSaved has an administrator's way of saving rules, "nft list ruleset", give what nft takes again.
func TestRulesetCanBeSaved(t *testing.T) {
	n := newNamespace(t)
	n.must(n.nftables().Add(t.Context(), baseDual, routed("c1@eth0", "veth0", "10.1.0.5", "fd00:1::5")))
	n.must(n.nftables().Add(t.Context(), baseDual, bridged("c2@eth0", "veth1", "10.1.0.6", "fd00:1::6")))
	before, saved := n.ruleset(), n.run("nft list ruleset")
	n.run("nft flush ruleset")
	n.nft(saved)
	n.wantRuleset("after it was loaded again", before)
}
