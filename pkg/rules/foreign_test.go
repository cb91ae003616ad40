package rules

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/nft"
)

// foreignTables are other programs' tables with names and comments like ours.
const foreignTables = `
table inet firewall {
	set kube2iam-cni { type ipv4_addr; elements = { 10.1.0.5 comment "c1@eth0" } }
	chain forward {
		type filter hook forward priority filter; policy accept;
		ip daddr 169.254.169.254 tcp dport 80 accept comment "c1@eth0"
	}
}
table ip kube-proxy {
	map routed { type ifname . ipv4_addr : ipv4_addr . inet_service; elements = { "veth0" . 10.1.0.5 comment "c1@eth0" : 192.168.7.2 . 8181 } }
	chain redirections { type nat hook prerouting priority dstnat; policy accept; }
}
table ip6 kube-proxy {
	chain redirections { type nat hook prerouting priority dstnat; policy accept; }
}
table bridge firewall {
	set bound4 { type ipv4_addr; elements = { 10.1.0.5 comment "c1@eth0", 10.1.0.6 comment "c2@eth0" } }
	chain prerouting {
		type filter hook prerouting priority -350; policy accept;
		ip saddr @bound4 meta mark set 0x1000 comment "own address, mark 0x1000"
	}
}
`

// foreignRules adds rules of other programs to every table of iptables.
func (h *host) foreignRules() {
	h.Helper()
	h.nftScript(foreignTables)
	for _, command := range []string{"iptables", "ip6tables"} {
		for _, rule := range []string{"-t filter -A FORWARD -j ACCEPT", "-t mangle -A POSTROUTING -j ACCEPT",
			"-t nat -A PREROUTING -p tcp --dport 80 -m comment --comment mine -j ACCEPT", "-t nat -N KUBE-SERVICES", "-t nat -A PREROUTING -j KUBE-SERVICES"} {
			h.run(command + " " + rule)
		}
	}
}

// foreign returns all rules of other programs.
func (h *host) foreign() string {
	h.Helper()
	var lines []string
	for _, line := range strings.Split(h.run("nft list ruleset; iptables-save; ip6tables-save"), "\n") {
		if !strings.HasPrefix(line, "#") && !strings.HasPrefix(line, ":") && !strings.Contains(line, IPTablesChain) {
			lines = append(lines, line)
		}
	}
	all := strings.Join(lines, "\n")
	for _, family := range []string{"ip", "ip6", "bridge"} {
		if start := strings.Index(all, "table "+family+" "+Table+" {"); start >= 0 {
			end := strings.Index(all[start:], "\n}\n")
			all = all[:start] + all[start+end+len("\n}\n"):]
		}
	}
	return all
}

func TestForeignRulesStay(t *testing.T) {
	h := newHost(t)
	h.foreignRules()
	before := h.foreign()
	unchanged := func(when string) {
		t.Helper()
		if diff := cmp.Diff(before, h.foreign()); diff != "" {
			t.Errorf("%s (-before +after):\n%s", when, diff)
		}
	}
	for _, r := range pods() {
		h.must(h.Attach(t.Context(), r, nil))
		unchanged("after ADD of " + r.ID())
	}
	_, err := h.Reconcile(t.Context(), pods()[:1], attachment.BackendNFTables, false)
	h.must(err)
	unchanged("after Reconcile")
	h.must(h.Detach(t.Context(), pods()[0]))
	h.must(h.detachID("c1@eth0"))
	unchanged("after DEL")
	h.nftScript("add table bridge " + nft.ProbePrefix + "1")
	h.must(h.Uninstall(t.Context()))
	unchanged("after Uninstall")
	if rest := h.run("nft list tables"); strings.Contains(rest, Table) {
		t.Errorf("Uninstall left %s", rest)
	}
	h.must(h.Uninstall(t.Context()))
}

// TestRulesetCanBeSaved loads what nft(8) lists, as distributions do at boot.
func TestRulesetCanBeSaved(t *testing.T) {
	h := newHost(t)
	_, err := h.Reconcile(t.Context(), pods(), attachment.BackendNFTables, false)
	h.must(err)
	before := h.ruleset()
	saved := filepath.Join(t.TempDir(), "saved.nft")
	h.run("nft list ruleset >" + saved + " && nft flush ruleset && nft -f " + saved)
	h.wantRuleset("after a reload", before)
}

func TestUninstallLeavesNothing(t *testing.T) {
	h := newHost(t)
	for _, r := range pods() {
		h.must(h.Attach(t.Context(), r, nil))
	}
	h.must(h.Uninstall(t.Context()))
	h.wantRuleset("after Uninstall", "")
	h.wantTransactions("Uninstall of nothing", 0, func() { h.must(h.Uninstall(t.Context())) })
}
