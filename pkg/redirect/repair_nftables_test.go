package redirect

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

const (
	inRouted4  = "redirection of c1@eth0 by veth0 from 10.1.0.5 to 192.168.7.2:8181 in routed of table ip kube2iam-cni"
	inRouted6  = "redirection of c1@eth0 by veth0 from fd00:1::5 to [fd00:7::2]:8181 in routed of table ip6 kube2iam-cni"
	inBridged4 = "redirection of c2@eth0 from 10.1.0.6 to 192.168.7.2:8181 in bridged of table ip kube2iam-cni"
	inBridged6 = "redirection of c2@eth0 from fd00:1::6 to [fd00:7::2]:8181 in bridged of table ip6 kube2iam-cni"
)

func TestRepairNFTables(t *testing.T) {
	chains := func(family string) []string {
		return []string{"missing: backstop in table " + family + " kube2iam-cni", "missing: guard in table " + family + " kube2iam-cni", "missing: redirections in table " + family + " kube2iam-cni",
			"missing: unmark in table " + family + " kube2iam-cni"}
	}
	table4 := append(chains("ip"), "missing: entry of kube2iam-cni from 169.254.169.254 in addresses of table ip kube2iam-cni",
		"missing: entry of kube2iam-cni from 169.254.169.254 in metadata of table ip kube2iam-cni",
		"missing: "+inRouted4, "missing: "+inBridged4)
	table6 := append(chains("ip6"), "missing: entry of kube2iam-cni from fd00:ec2::254 in addresses of table ip6 kube2iam-cni",
		"missing: entry of kube2iam-cni from fd00:ec2::254 in metadata of table ip6 kube2iam-cni",
		"missing: "+inRouted6, "missing: "+inBridged6)
	bridge := slices.DeleteFunc(portsMissing("c2@eth0"), func(line string) bool { return strings.Contains(line, "unmark") })
	for name, tc := range map[string]struct {
		nft string
		did []string
	}{
		"everything is flushed":        {"flush ruleset", slices.Concat(table4, table6, bridge)},
		"a family's table is gone":     {"delete table ip kube2iam-cni", table4},
		"the bridge's table is gone":   {"delete table bridge kube2iam-cni", bridge},
		"a family's rules are flushed": {"flush table ip kube2iam-cni", chains("ip")},
		"a family's table sleeps":      {"add table ip kube2iam-cni { flags dormant; }", chains("ip")},
		"a chain is flushed":           {"flush chain ip6 kube2iam-cni redirections", []string{"missing: redirections in table ip6 kube2iam-cni"}},
		"the guard is gone":            {"delete chain ip kube2iam-cni guard", []string{"missing: guard in table ip kube2iam-cni"}},
		"the second guard is flushed":  {"flush chain ip6 kube2iam-cni backstop", []string{"missing: backstop in table ip6 kube2iam-cni"}},
		"the guard forgets an address": {"flush set ip kube2iam-cni addresses",
			[]string{"missing: entry of kube2iam-cni from 169.254.169.254 in addresses of table ip kube2iam-cni"}},
		"a rule stands above the guard":    {"insert rule ip kube2iam-cni guard accept", []string{"missing: guard in table ip kube2iam-cni"}},
		"a rule stands behind the guard":   {"add rule bridge kube2iam-cni pass accept", []string{"missing: pass in table bridge kube2iam-cni"}},
		"the guard stands twice":           {"add rule ip kube2iam-cni guard drop comment guard", []string{"missing: guard in table ip kube2iam-cni"}},
		"a redirection is missing":         {"delete element ip kube2iam-cni routed { veth0 . 10.1.0.5 }", []string{"missing: " + inRouted4}},
		"a bridged redirection is missing": {"delete element ip6 kube2iam-cni bridged { fd00:1::6 }", []string{"missing: " + inBridged6}},
		"the service is missing": {"delete element ip kube2iam-cni metadata { 169.254.169.254 . 80 }",
			[]string{"missing: entry of kube2iam-cni from 169.254.169.254 in metadata of table ip kube2iam-cni"}},
		"a port's address is missing": {"flush set bridge kube2iam-cni holders6",
			[]string{"missing: entry of c2@eth0 by veth1 from fd00:1::6 in holders6 of table bridge kube2iam-cni"}},
		"a redirection leads elsewhere": {`delete element ip kube2iam-cni routed { veth0 . 10.1.0.5 }
			add element ip kube2iam-cni routed { veth0 . 10.1.0.5 comment "c1@eth0" : 192.168.7.3 . 8181 }`,
			[]string{"missing: " + inRouted4, "stale: " + strings.Replace(inRouted4, "7.2", "7.3", 1)}},
		"a redirection is another's": {`delete element ip kube2iam-cni bridged { 10.1.0.6 }
			add element ip kube2iam-cni bridged { 10.1.0.6 comment "c9@eth0" : 192.168.7.2 . 8181 }`,
			[]string{"missing: " + inBridged4, "stale: " + strings.Replace(inBridged4, "c2", "c9", 1)}},
		"a pod is nobody's": {`add element ip kube2iam-cni routed { veth9 . 10.1.0.9 comment "c9@eth0" : 192.168.7.2 . 8181 }`,
			[]string{"stale: " + strings.NewReplacer("c1", "c9", "veth0", "veth9", "0.5", "0.9").Replace(inRouted4)}},
	} {
		t.Run(name, func(t *testing.T) {
			n := newRepairNode(t, NFTables)
			n.nft(tc.nft)
			want := slices.Clone(tc.did)
			slices.Sort(want)
			n.transactions("the repair", 1, func() { n.repair(want, n.whole) })
		})
	}
}

// TestRepairCollectsAPodOfNFTables takes everything of it, on the bridge, too.
func TestRepairCollectsAPodOfNFTables(t *testing.T) {
	n := newRepairNode(t, NFTables)
	n.add(NFTables, bridged("c9@eth0", "veth9", "10.1.0.9", "fd00:1::9"))
	want := portEntries("stale", "c9@eth0", "veth9", "10.1.0.9", "fd00:1::9")
	for _, line := range []string{inBridged4, inBridged6} {
		want = append(want, "stale: "+strings.NewReplacer("c2", "c9", "0.6", "0.9", "1::6", "1::9").Replace(line))
	}
	slices.Sort(want)
	n.repair(want, n.whole)
}

// TestRepairLeavesElementsThatAreNotOurs has somebody's in our maps. None is an attachment's.
func TestRepairLeavesElementsThatAreNotOurs(t *testing.T) {
	n := newRepairNode(t, NFTables)
	n.nft(`add element ip kube2iam-cni routed { veth8 . 10.1.0.8 : 192.168.7.2 . 8181, veth9 . 10.1.0.9 comment "somebody" : 192.168.7.2 . 8181 }`)
	n.whole = n.all()
	n.idle("with others' elements")
	n.nft("delete element ip kube2iam-cni routed { veth0 . 10.1.0.5 }")
	n.repair([]string{"missing: " + inRouted4}, n.whole)
}

// TestRepairOfTwoForms has pods of iptables live on, on a node that chose nftables since: they share the bridge's table.
func TestRepairOfTwoForms(t *testing.T) {
	forms(t, func(t *testing.T, form Form) {
		n := &repairNode{namespace: newNamespace(t, both...), form: form}
		former, later := bridged("c2@eth0", "veth1", "10.1.0.6", "fd00:1::6"), bridged("c3@eth0", "veth3", "10.1.0.7", "fd00:1::7")
		former.Mark = DefaultMark
		n.wanted = Wanted{Base: baseDual, Chosen: NFTables, Attachments: map[Form][]Attachment{form: {former}, NFTables: {later}}}
		n.add(NFTables, later)
		n.add(form, former)
		n.whole = n.all()
		n.idle("both")

		n.command(form, "-t nat -F KUBE2IAM-CNI")
		n.flushTables()
		did, err := n.Repair(t.Context(), n.wanted, false)
		n.must(err)
		for _, id := range []string{"c2@eth0", "c3@eth0"} {
			want := fmt.Sprintf("missing: entry of %s by ", id)
			if !slices.ContainsFunc(did, func(line string) bool { return strings.HasPrefix(line, want) }) {
				t.Errorf("%q is not in %q", want, did)
			}
		}
		if after := n.all(); after != n.whole {
			t.Errorf("after the repair:\n%s", diff(n.whole, after))
		}
		n.idle("once more")
	})
}
