package redirect

import (
	"strings"
	"testing"
)

// hiding is where another program puts rules of nftables that iptables has no words for: next to ours.
var hiding = []string{"ip nat PREROUTING", "ip filter FORWARD", "ip mangle POSTROUTING", "ip6 nat PREROUTING", "ip6 filter FORWARD", "ip6 mangle POSTROUTING"}

// hide puts one there. From then on iptables-nft lists nothing of the tables.
func (n *repairNode) hide() {
	n.Helper()
	for _, chain := range hiding {
		n.run("nft add rule " + chain + " ct mark 0x99 counter")
	}
	for _, save := range []string{"iptables-nft-save", "ip6tables-nft-save"} {
		if listed := n.run(save); strings.Contains(listed, Chain) {
			n.Fatalf("%s is not hidden from:\n%s", Chain, listed)
		}
	}
}

// shown are all rules, but for those that hide the others.
func (n *repairNode) shown() string {
	n.Helper()
	for _, chain := range hiding {
		for line := range strings.Lines(n.run("nft -a list chain " + chain)) {
			if rule, handle, ok := strings.Cut(line, " # handle "); ok && strings.Contains(rule, "ct mark 0x00000099") {
				n.run("nft delete rule " + chain + " handle " + strings.TrimSpace(handle))
			}
		}
	}
	return n.all()
}

// TestHiddenTables is a node where a program wrote rules of nftables into the tables of iptables-nft: rules of ours that
// iptables does not list are neither missing nor made again, and those that are missing or stale are told from them.
func TestHiddenTables(t *testing.T) {
	n := newRepairNode(t, NFT)
	for name, tc := range map[string]struct {
		damage func()
		did    int
	}{
		"nothing":                   {func() {}, 0},
		"the redirections are gone": {func() { n.command(NFT, "-t nat -F "+Chain) }, 4},
		"the guards are gone": {func() {
			n.run("iptables-nft -D FORWARD " + strings.Join(refusal(metadata4).spec, " "))
			n.run("ip6tables-nft -t mangle -D POSTROUTING " + strings.Join(backstop(metadata6).spec, " "))
		}, 2},
		"the jump is gone": {func() { n.run("iptables-nft -t nat -D PREROUTING " + strings.Join(jump(metadata4, Chain).spec, " ")) }, 1},
		"the chain is gone": {func() {
			n.run("iptables-nft -t nat -D PREROUTING " + strings.Join(jump(metadata4, Chain).spec, " "))
			n.command(NFT, "-t nat -F "+Chain)
			n.run("iptables-nft -t nat -X " + Chain)
		}, 5},
		"an attachment has ended": {func() { n.add(NFT, routed("c9@eth0", "veth9", "10.1.0.9", "fd00:1::9")) }, 2},
		"a redirection is doubled": {func() {
			n.run("iptables-nft -t nat -A " + Chain + " " + strings.Join(n.wanted.Attachments[NFT][0].rule(redirection("10.1.0.5")).spec, " "))
		}, 1},
	} {
		n.hide()
		tc.damage()
		n.forget()
		did, err := n.Repair(t.Context(), n.wanted, false)
		n.must(err)
		if len(did) != tc.did {
			t.Errorf("%s: did %q", name, did)
		}
		if after := n.shown(); after != n.whole {
			t.Errorf("%s:\n%s", name, diff(n.whole, after))
		}
	}
	pod := routed("c9@eth0", "veth9", "10.1.0.9", "fd00:1::9")
	n.hide()
	n.forget()
	n.add(NFT, pod)
	n.add(NFT, routed("c8@eth0", "veth8", "10.1.0.8"))
	n.must(n.Remove(NFT, pod))
	n.must(n.RemoveLeftovers("c8@eth0"))
	if after := n.shown(); after != n.whole {
		t.Errorf("after ADD and DEL:\n%s", diff(n.whole, after))
	}
}
