package redirect

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// allBackends runs a test once for each way of programming rules.
func allBackends(t *testing.T, test func(*testing.T, Form)) {
	for _, form := range allForms {
		t.Run(string(form), func(t *testing.T) { test(t, form) })
	}
}

// foreignTables are other programs' in nftables itself, in every family, with what looks like ours.
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
	set held4 { type ipv4_addr; elements = { 10.1.0.5 comment "c1@eth0", 10.1.0.6 comment "c2@eth0" } }
	chain enter {
		type filter hook prerouting priority -350; policy accept;
		ip saddr @held4 meta mark set 0x1000 comment "own address, mark 0x1000"
	}
}
`

// othersRules are all that are not ours.
func (n *namespace) othersRules() string {
	n.Helper()
	var others []string
	for _, table := range n.nftTables() {
		name := strings.Fields(table)[2]
		if name != Table && !slices.Contains([]string{"filter", "mangle", "nat"}, name) {
			others = append(others, table)
		}
	}
	for line := range strings.Lines(n.everything()) {
		if !strings.Contains(line, Comment) && !strings.Contains(line, Chain) {
			others = append(others, line)
		}
	}
	return strings.Join(others, "")
}

// TestOthersRulesAreLeftAlone compares all rules of other programs, byte for byte, through the life of two pods.
func TestOthersRulesAreLeftAlone(t *testing.T) {
	allBackends(t, func(t *testing.T, form Form) {
		n := newNamespace(t, both...)
		for _, form := range []Form{NFT, Legacy} {
			foreign(n, form)
			ip6tables := strings.Replace(string(form), "iptables", "ip6tables", 1)
			for _, rule := range []string{"-t filter -A FORWARD -j ACCEPT", "-t mangle -A POSTROUTING -j ACCEPT", "-t nat -A PREROUTING -j ACCEPT"} {
				n.run(ip6tables + " " + rule)
			}
		}
		n.nft(foreignTables)
		before := n.othersRules()
		unchanged := func(when string) {
			t.Helper()
			if after := n.othersRules(); after != before {
				t.Errorf("%s:\n%s", when, diff(before, after))
			}
		}
		b, err := n.Backend(form)
		n.must(err)
		pods := []Attachment{routed("c1@eth0", "veth0", "10.1.0.5", "fd00:1::5"), bridged("c2@eth0", "veth1", "10.1.0.6", "fd00:1::6")}
		if form != NFTables {
			pods[1].Mark = DefaultMark
		}
		for _, a := range pods {
			n.must(b.Add(t.Context(), baseDual, a))
			unchanged("after the ADD of " + a.ID)
		}
		repair := func(when string, attachments ...Attachment) {
			t.Helper()
			_, err := n.Repair(t.Context(), Wanted{Base: baseDual, Chosen: form, Attachments: map[Form][]Attachment{form: attachments}, Everywhere: true}, false)
			n.must(err)
			unchanged(when)
		}
		repair("after a Repair of nothing", pods...)
		n.flushOurs()
		unchanged("after our rules were flushed, which is the test's own doing")
		repair("after a Repair of everything", pods...)
		missing, err := b.Missing(baseDual, pods[0])
		// The other form of iptables has rules at prerouting, too.
		missing = slices.DeleteFunc(missing, func(what string) bool {
			return form != NFTables && strings.HasPrefix(what, "precedence over the NAT chain PREROUTING of ")
		})
		if err != nil || len(missing) > 0 {
			t.Errorf("after a Repair of everything: %v, %v", missing, err)
		}
		repair("after a Repair that collects a pod", pods[0])
		n.must(n.Remove(form, pods[0]))
		unchanged("after a DEL")
		n.must(b.Add(t.Context(), baseDual, pods[0]))
		n.must(n.RemoveLeftovers(pods[0].ID))
		unchanged("after a DEL without a record")
	})
}

// flushOurs removes what stands of ours, in all forms.
func (n *namespace) flushOurs() {
	n.Helper()
	for _, table := range n.nftTables() {
		if family, name := strings.Fields(table)[1], strings.Fields(table)[2]; name == Table {
			n.run("nft delete table " + family + " " + name)
		}
	}
	for _, form := range []Form{NFT, Legacy} {
		for _, v6 := range []bool{false, true} {
			command, table := string(form), ""
			if v6 {
				command = strings.Replace(command, "iptables", "ip6tables", 1)
			}
			for line := range strings.Lines(n.rules(form, v6)) {
				switch line = strings.TrimSpace(line); {
				case strings.HasPrefix(line, "*"):
					table = line[1:]
				case strings.HasPrefix(line, "-A "+Chain):
				case strings.HasPrefix(line, "-A ") && strings.Contains(line, "--comment "+Comment):
					n.run(command + " -t " + table + " -D " + line[len("-A "):])
				}
			}
			if strings.Contains(n.rules(form, v6), ":"+Chain) {
				n.run(command + " -t nat -F " + Chain)
				n.run(command + " -t nat -X " + Chain)
			}
		}
	}
}

// nft runs a script of nft.
func (n *namespace) nft(script string) {
	n.Helper()
	file := filepath.Join(n.TempDir(), "script.nft")
	n.must(os.WriteFile(file, []byte(script), 0o600))
	n.run("nft -f " + file)
}
