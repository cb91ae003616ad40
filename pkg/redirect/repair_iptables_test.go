package redirect

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

// says puts the form behind each of the lines that Repair says of iptables.
func says(form Form, lines ...string) []string {
	for i := range lines {
		lines[i] = fmt.Sprintf("%s (%s)", lines[i], form)
	}
	return lines
}

// portsMissing are the lines of a bridge's table that is gone, with the end of the mark.
func portsMissing(ids ...string) []string {
	lines := []string{
		"missing: enter in table bridge kube2iam-cni", "missing: leave in table bridge kube2iam-cni", "missing: pass in table bridge kube2iam-cni",
		"missing: entry of kube2iam-cni from 169.254.169.254 in metadata4 of table bridge kube2iam-cni",
		"missing: entry of kube2iam-cni from fd00:ec2::254 in metadata6 of table bridge kube2iam-cni",
		"missing: entry of kube2iam-cni from 169.254.169.254 in addresses4 of table bridge kube2iam-cni",
		"missing: entry of kube2iam-cni from fd00:ec2::254 in addresses6 of table bridge kube2iam-cni",
		"missing: unmark in table ip kube2iam-cni", "missing: unmark in table ip6 kube2iam-cni",
	}
	for _, id := range ids {
		lines = append(lines, portEntries("missing", id, "veth1", "10.1.0.6", "fd00:1::6")...)
	}
	return lines
}

func portEntries(how, id, link, ip4, ip6 string) []string {
	return []string{
		fmt.Sprintf("%s: entry of %s by %s from %s in holders4 of table bridge kube2iam-cni", how, id, link, ip4),
		fmt.Sprintf("%s: entry of %s by %s from %s in holders6 of table bridge kube2iam-cni", how, id, link, ip6),
		fmt.Sprintf("%s: entry of %s from %s in held4 of table bridge kube2iam-cni", how, id, ip4),
		fmt.Sprintf("%s: entry of %s from %s in held6 of table bridge kube2iam-cni", how, id, ip6),
	}
}

func TestRepairIPTables(t *testing.T) {
	const proxied4, proxied6 = "192.168.7.2:8181", "[fd00:7::2]:8181"
	redirections := []string{
		"missing: redirection of 10.1.0.5 to " + proxied4, "missing: redirection of 10.1.0.6 to " + proxied4,
		"missing: redirection of fd00:1::5 to " + proxied6, "missing: redirection of fd00:1::6 to " + proxied6,
	}
	jumps := []string{"missing: jump to KUBE2IAM-CNI", "missing: jump to KUBE2IAM-CNI"}
	guards := []string{"missing: guard in filter FORWARD", "missing: guard in filter FORWARD",
		"missing: guard in mangle POSTROUTING", "missing: guard in mangle POSTROUTING"}
	const c1 = "KUBE2IAM-CNI -s 10.1.0.5/32 -d 169.254.169.254/32 -i veth0 -p tcp -m tcp --dport 80 -m comment --comment c1@eth0 -j DNAT --to-destination " + proxied4
	for name, tc := range map[string]struct {
		damage func(*repairNode)
		did    []string // but for the form behind each
		more   []string // as they are
	}{
		"nat is flushed": {
			func(n *repairNode) { n.command(n.form, "-t nat -F", "-t nat -X") },
			slices.Concat(jumps, redirections), nil,
		},
		"our chain is flushed":  {func(n *repairNode) { n.command(n.form, "-t nat -F KUBE2IAM-CNI") }, redirections, nil},
		"PREROUTING is flushed": {func(n *repairNode) { n.command(n.form, "-t nat -F PREROUTING") }, jumps, nil},
		"filter is flushed":     {func(n *repairNode) { n.command(n.form, "-F") }, guards[:2], nil},
		"mangle is flushed":     {func(n *repairNode) { n.command(n.form, "-t mangle -F") }, guards[2:], nil},
		"everything is flushed": {
			func(n *repairNode) {
				n.command(n.form, "-F", "-t mangle -F", "-t nat -F", "-t nat -X")
				n.flushTables()
			},
			slices.Concat(guards, jumps, redirections), portsMissing("c2@eth0"),
		},
		"the bridge's table is gone": {(*repairNode).flushTables, nil, portsMissing("c2@eth0")},
		"one redirection is missing": {
			func(n *repairNode) { n.run(string(n.form) + " -t nat -D " + c1) }, redirections[:1], nil,
		},
		"one redirection is there twice": {
			func(n *repairNode) { n.run(string(n.form) + " -t nat -A " + c1) }, []string{"stale: rule of c1@eth0"}, nil,
		},
		"one redirection is there four times": {
			func(n *repairNode) {
				for range 3 {
					n.run(string(n.form) + " -t nat -I " + c1)
				}
			}, slices.Repeat([]string{"stale: rule of c1@eth0"}, 3), nil,
		},
		"a redirection leads elsewhere": {
			func(n *repairNode) {
				n.run(string(n.form) + " -t nat -D " + c1)
				n.run(string(n.form) + " -t nat -A " + strings.Replace(c1, "192.168.7.2", "192.168.7.3", 1))
			}, []string{"missing: redirection of 10.1.0.5 to " + proxied4, "stale: rule of c1@eth0"}, nil,
		},
		"a pod is nobody's": {
			func(n *repairNode) { n.add(n.form, routed("c9@eth0", "veth9", "10.1.0.9", "fd00:1::9")) },
			[]string{"stale: rule of c9@eth0", "stale: rule of c9@eth0"}, nil,
		},
		"a pod on the bridge is nobody's": {
			func(n *repairNode) { n.add(n.form, bridged("c9@eth0", "veth9", "10.1.0.9", "fd00:1::9")) },
			[]string{"stale: rule of c9@eth0", "stale: rule of c9@eth0"}, portEntries("stale", "c9@eth0", "veth9", "10.1.0.9", "fd00:1::9"),
		},
		"a pod has its port from another": {
			func(n *repairNode) {
				n.must((&ports{new(nft)}).add(baseDual, bridged("c9@eth0", "veth1", "10.1.0.6", "fd00:1::6")))
			}, nil, slices.Concat(portEntries("missing", "c2@eth0", "veth1", "10.1.0.6", "fd00:1::6"), portEntries("stale", "c9@eth0", "veth1", "10.1.0.6", "fd00:1::6")),
		},
	} {
		t.Run(name, func(t *testing.T) {
			forms(t, func(t *testing.T, form Form) {
				n := newRepairNode(t, form)
				tc.damage(n)
				want := append(says(form, slices.Clone(tc.did)...), tc.more...)
				slices.Sort(want)
				n.repair(want, n.whole)
			})
		})
	}
}

// flushTables deletes our tables of nftables.
func (n *repairNode) flushTables() {
	n.Helper()
	for _, family := range []string{"bridge", "ip", "ip6"} {
		n.run("nft delete table " + family + " kube2iam-cni")
	}
}

// TestRepairLeavesWhatIsNotOurs has somebody's rules in our chain and at the places of our base. None is an attachment's.
func TestRepairLeavesWhatIsNotOurs(t *testing.T) {
	forms(t, func(t *testing.T, form Form) {
		n := newRepairNode(t, form)
		foreign(n.namespace, form)
		for _, rule := range []string{
			"-s 10.1.0.9/32 -j RETURN",
			"-s 10.1.0.9/32 -m comment --comment somebody -j RETURN",
			"-s 10.1.0.9/32 -m comment --comment kube2iam-cni -j RETURN",
			"-s 10.1.0.5/32 -d 169.254.169.254/32 -i veth0 -p tcp -m tcp --dport 80 -j DNAT --to-destination 192.168.7.2:8181",
		} {
			n.run(string(form) + " -t nat -A KUBE2IAM-CNI " + rule)
		}
		// A sentence is nobody's identity, whatever its first word is.
		n.sh(string(form) + " -t nat -A KUBE2IAM-CNI -s 10.1.0.9/32 -m comment --comment 'ops@example.com: do not touch' -j RETURN")
		n.whole = n.all()
		n.idle("with others' rules")

		n.add(form, routed("c9@eth0", "veth9", "10.1.0.9", "fd00:1::9"))
		want := says(form, "stale: rule of c9@eth0", "stale: rule of c9@eth0")
		n.repair(want, n.whole)
	})
}

// TestRepairFollowsTheRecords has a record changed under the rules: what was is taken away, what is comes.
func TestRepairFollowsTheRecords(t *testing.T) {
	forms(t, func(t *testing.T, form Form) {
		n := newRepairNode(t, form)
		pods := n.wanted.Attachments[form]
		moved := routed("c1@eth0", "veth0", "10.1.0.5", "fd00:1::5")
		moved.Redirections[0].Proxy = netip.MustParseAddrPort("192.168.7.3:9999")
		n.wanted.Attachments[form] = []Attachment{moved}
		want := append(says(form, "missing: redirection of 10.1.0.5 to 192.168.7.3:9999", "stale: rule of c1@eth0", "stale: rule of c2@eth0", "stale: rule of c2@eth0"),
			portEntries("stale", "c2@eth0", "veth1", "10.1.0.6", "fd00:1::6")...)
		slices.Sort(want)
		did, err := n.Repair(t.Context(), n.wanted, false)
		n.must(err)
		slices.Sort(did)
		if !slices.Equal(did, want) {
			t.Errorf("did %q, want %q", did, want)
		}
		n.idle("as the records say")
		n.wanted.Attachments[form] = pods
		_, err = n.Repair(t.Context(), n.wanted, false)
		n.must(err)
		if after := n.all(); after != n.whole {
			t.Errorf("and back:\n%s", diff(n.whole, after))
		}
	})
}

// TestRepairKnowsItsRules has rules that the save commands write in words of their own.
func TestRepairKnowsItsRules(t *testing.T) {
	longest := routed(strings.Repeat("c", 200)+"@"+strings.Repeat("e", 15), strings.Repeat("v", 15), "10.1.0.5", "fd00:1:0:2:0:3:0:5")
	onPort, marked, allMarks := bridged("c2@eth0", "veth1", "10.1.0.6", "fd00:1::6"), bridged("c2@eth0", "veth1", "10.1.0.6", "fd00:1::6"), bridged("c2@eth0", "veth1", "10.1.0.6", "fd00:1::6")
	marked.Mark, allMarks.Mark = 0x80000000, 0xffffffff
	for name, a := range map[string]Attachment{"the longest names": longest, "by the port": onPort, "by one bit": marked, "by all bits": allMarks} {
		t.Run(name, func(t *testing.T) {
			forms(t, func(t *testing.T, form Form) {
				n := &repairNode{namespace: newNamespace(t, both...), form: form}
				n.wanted = Wanted{Base: baseDual, Chosen: form, Attachments: map[Form][]Attachment{form: {a}}}
				n.wanted.Base.Mark = a.Mark
				did, err := n.Repair(t.Context(), n.wanted, false)
				n.must(err)
				if len(did) == 0 {
					t.Error("did nothing")
				}
				n.idle("once more")
				n.must(n.Remove(form, a))
				if strings.Contains(n.all(), "DNAT") {
					t.Errorf("after DEL:\n%s", n.all())
				}
			})
		})
	}
}
