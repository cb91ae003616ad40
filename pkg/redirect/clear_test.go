package redirect

import (
	"net/netip"
	"strings"
	"testing"
)

// cleared asserts that a Clear leaves what others have, and nothing of ours.
func (n *repairNode) cleared() {
	n.Helper()
	others := n.othersRules()
	for _, when := range []string{"once", "again"} {
		n.nft("add table bridge " + probePrefix + "1") // of a probe that died
		n.forget()
		n.must(n.Clear(n.Context(), []netip.AddrPort{metadata4, metadata6}))
		if now := n.othersRules(); now != others {
			n.Errorf("%s: other people's rules changed:\n%s", when, diff(others, now))
		}
		for line := range strings.Lines(n.everything()) {
			if strings.Contains(line, Comment) || strings.Contains(line, Chain) {
				n.Errorf("%s: left: %s", when, line)
			}
		}
		for _, table := range n.nftTables() {
			if name := strings.Fields(table)[2]; name == Table || strings.HasPrefix(name, probePrefix) {
				n.Errorf("%s: left: %s", when, table)
			}
		}
	}
}

func TestClearLeavesTheRulesetsOfOthers(t *testing.T) {
	allBackends(t, func(t *testing.T, form Form) {
		n := newRepairNode(t, form)
		n.nft(foreignTables)
		for _, other := range []Form{NFT, Legacy} {
			n.command(other, "-t nat -A PREROUTING -p tcp --dport 80 -m comment --comment mine -j ACCEPT", "-t filter -A FORWARD -p tcp --dport 80 -j ACCEPT",
				"-t nat -N KUBE-SERVICES", "-t nat -A PREROUTING -j KUBE-SERVICES")
		}
		n.cleared()
	})
}

// TestClearAfterAProcessDied has a chain that no jump leads to, and one that was not given its name yet.
func TestClearAfterAProcessDied(t *testing.T) {
	for _, form := range []Form{NFT, Legacy} {
		t.Run(string(form), func(t *testing.T) {
			n := newRepairNode(t, form)
			n.command(form, "-t nat -N "+newChain, "-t nat -A "+newChain+" -j RETURN", "-t nat -A PREROUTING "+strings.Join(ours(), " ")+" -j "+newChain)
			n.command(form, "-t filter -F")
			n.cleared()
		})
	}
}

func TestClearFindsWhatIsHiddenFromIPTables(t *testing.T) {
	n := newRepairNode(t, NFT)
	n.hide()
	n.forget()
	n.must(n.Clear(n.Context(), []netip.AddrPort{metadata4, metadata6}))
	n.shown()
	n.cleared()
	for line := range strings.Lines(n.everything()) {
		if strings.Contains(line, "169.254.169.254") || strings.Contains(line, "fd00:ec2::254") {
			t.Errorf("left: %s", line)
		}
	}
}

func TestClearOfANodeThatHasNothingMakesNothing(t *testing.T) {
	n := newNamespace(t, both...)
	n.must(n.Clear(n.Context(), []netip.AddrPort{metadata4}))
	if legacy, nft := n.legacyTables(), n.nftTables(); legacy != "" || len(nft) > 0 {
		t.Errorf("made legacy tables %q, nftables %q", legacy, nft)
	}
}

// TestClearTakesAwayTheChainsThatIPTablesMadeForOurRules is a node whose own rules are in other chains, as kube-proxy's with nftables.
func TestClearTakesAwayTheChainsThatIPTablesMadeForOurRules(t *testing.T) {
	n := newNamespace(t, both...)
	for _, command := range []string{"iptables-nft", "ip6tables-nft"} {
		n.run(command + " -t mangle -N KUBE-IPTABLES-HINT")
		n.run(command + " -t nat -A POSTROUTING -j ACCEPT")
		n.run(command + " -t filter -P FORWARD DROP")
	}
	before := n.run("nft list ruleset")
	for _, a := range []Attachment{routed("c1@eth0", "veth0", "10.1.0.5", "fd00:1::5")} {
		n.must(n.iptables(NFT).Add(n.Context(), baseDual, a))
	}
	if during := n.run("nft list ruleset"); !strings.Contains(during, "chain PREROUTING") || !strings.Contains(during, "postrouting priority mangle") {
		t.Fatalf("no chain was made:\n%s", during)
	}
	n.must(n.Clear(n.Context(), []netip.AddrPort{metadata4, metadata6}))
	if after := n.run("nft list ruleset"); after != before {
		t.Errorf("rules:\n%s", diff(before, after))
	}
}
