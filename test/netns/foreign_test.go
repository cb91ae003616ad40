package netns

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var forms = []string{"iptables-nft", "iptables-legacy", "ip6tables-nft", "ip6tables-legacy"}

// othersChains are rules of other programs beside the plugin's, in the format of
// iptables-restore. $SERVICE is the metadata service's address, $THEIRS one of their own. Some
// resemble the plugin's or name it.
const othersChains = `*nat
:KUBE-SERVICES - [0:0]
:KUBE2IAM-CNI-OF-OTHERS - [0:0]
-A PREROUTING -m comment --comment kube -j KUBE-SERVICES
-A PREROUTING -d $SERVICE -i docker0 -p tcp -m tcp --dport 80 -m comment --comment "before kube2iam-cni" -j DNAT --to-destination $THEIRS
-A KUBE-SERVICES -d $THEIRS -p tcp -m tcp --dport 443 -j DNAT --to-destination $THEIRS
-A KUBE2IAM-CNI-OF-OTHERS -d $SERVICE -p tcp -m tcp --dport 80 -j RETURN
COMMIT
*mangle
-A POSTROUTING -d $THEIRS -j ACCEPT
COMMIT
*filter
-A FORWARD -s $THEIRS -j ACCEPT
-A FORWARD -d $SERVICE -p tcp -m tcp --dport 80 -m comment --comment another -j DROP
COMMIT
`

// othersTable is a table of another program in $FAMILY, whose sets, maps and chains have the
// plugin's names. $HOOK is the chain's hook, $RULE its rule. It changes no packet.
const othersTable = `table $FAMILY somebody {
	set held {
		type ipv4_addr
		flags interval
		elements = { 10.201.0.0/16, 169.254.169.254 }
	}
	map routed {
		type ipv4_addr . inet_service : verdict
		elements = { 169.254.169.254 . 80 : continue, 10.201.0.2 . 80 : continue, 10.201.0.3 . 80 : continue }
	}
	chain KUBE2IAM-CNI {
		counter comment "kube2iam-cni"
	}
	chain guard {
		type filter hook $HOOK; policy accept;
		$RULE
	}
}
`

// others adds rules of other programs by each command and in each family.
func (n *node) others() {
	n.t.Helper()
	for _, form := range forms {
		theirs := strings.NewReplacer("$SERVICE", "169.254.169.254/32", "$THEIRS", "10.99.0.1")
		if strings.HasPrefix(form, "ip6") {
			theirs = strings.NewReplacer("$SERVICE", "fd00:ec2::254/128", "$THEIRS", "fd00:99::1")
		}
		n.fromFile(theirs.Replace(othersChains), form+"-restore", "--noflush")
	}
	const ip = "ip daddr 169.254.169.254 tcp dport 80 counter jump KUBE2IAM-CNI"
	for _, t := range []struct{ family, hook, rule string }{
		{"ip", "prerouting priority -111", ip},
		{"ip6", "prerouting priority -111", "ip6 daddr fd00:ec2::254 tcp dport 80 counter jump KUBE2IAM-CNI"},
		{"inet", "forward priority -151", ip},
		{"bridge", "prerouting priority -351", ip},
		{"arp", "input priority 0", "counter"},
		{"netdev", "ingress device eth0 priority 0", ip},
	} {
		theirs := strings.NewReplacer("$FAMILY", t.family, "$HOOK", t.hook, "$RULE", t.rule)
		n.fromFile(theirs.Replace(othersTable), "nft", "-f")
	}
	// The plugin has no table of this family.
	n.fromFile("table inet kube2iam-cni { chain guard { counter; }; }", "nft", "-f")
}

// fromFile runs a real command on the node, whose last argument is a file with this content.
func (n *node) fromFile(content string, command ...string) {
	n.t.Helper()
	file := filepath.Join(n.Dir, "conf", "rules")
	n.must(os.WriteFile(file, []byte(content), 0o600))
	n.onNode(strings.Join(append(command, file), " "))
}

// foreign returns all rules of all commands and families except the plugin's, without counters.
func (n *node) foreign() string {
	n.t.Helper()
	var all []string
	for _, form := range forms {
		all = append(all, "== "+form, lineOfOurs.ReplaceAllString(chainCounters.ReplaceAllString(n.onNode(form+"-save"), ""), ""))
	}
	// With handles, which tell whether something was taken away and made again.
	ruleset := ruleCounters.ReplaceAllString(n.onNode("nft -a list ruleset"), "counter")
	for _, table := range tableBlock.FindAllString(ruleset, -1) {
		name := strings.Join(strings.Fields(table)[1:3], " ")
		if !slices.Contains(tablesOfOurs, name) && !tableOfIPTables.MatchString(name) {
			all = append(all, table)
		}
	}
	return strings.Join(all, "\n")
}

var (
	chainCounters = regexp.MustCompile(`\[\d+:\d+\]`)
	// Comments of the save commands, and the lines of rules and of the chain that are ours.
	lineOfOurs = regexp.MustCompile(`(?m)^(#.*|:KUBE2IAM-CNI -.*|-A KUBE2IAM-CNI .*|-A (FORWARD|POSTROUTING|PREROUTING) ` +
		`-d (169\.254\.169\.254/32|fd00:ec2::254/128) (! -p udp )?(-p tcp )?(-m tcp --dport 80 )?(-m addrtype ! --src-type LOCAL )?` +
		`-m comment --comment kube2iam-cni -j (REJECT --reject-with tcp-reset|DROP|KUBE2IAM-CNI))\n`)
	tablesOfOurs = []string{"bridge kube2iam-cni", "ip kube2iam-cni", "ip6 kube2iam-cni"}
	// iptables-nft-save tells more of its tables than nft does.
	tableOfIPTables = regexp.MustCompile(`^ip6? (nat|mangle|filter)$`)
	tableBlock      = regexp.MustCompile(`(?ms)^table .*?^\}`)
	ruleCounters    = regexp.MustCompile(`counter packets \d+ bytes \d+`)
)

// TestOthersRulesSurvive: the rules of other programs are byte for byte the same before the
// plugin's first rule and after its last.
func TestOthersRulesSurvive(t *testing.T) {
	dual := []setup{bridgeIPTables, bridged, routedIPTables}
	for i := range dual {
		dual[i].ipv6 = true
	}
	onThese(t, append(dual, setups...), func(t *testing.T, n *node) {
		n.others()
		before := n.foreign()
		same := func(after string) {
			t.Helper()
			if diff := cmp.Diff(strings.Split(before, "\n"), strings.Split(n.foreign(), "\n")); diff != "" {
				t.Errorf("others' rules after %s (-before +after):\n%s", after, diff)
			}
		}
		n.round()
		same("the agent's first round")
		pod := n.run("pod", "app")
		same("ADD")
		n.must(n.AddAgain(t.Context(), pod, pod.Result))
		same("a second ADD")
		n.endWithoutDEL(pod)
		n.round()
		same("a round that collected")
		n.must(n.Del(t.Context(), pod.Runtime()))
		same("a late DEL")
		stays := n.run("stays", "app")
		n.must(n.Check(t.Context(), stays))
		if n.backend == "nftables" {
			n.onNode("nft delete table ip kube2iam-cni")
		} else {
			n.onNode(n.backend + " -t nat -F KUBE2IAM-CNI")
		}
		n.round()
		same("a round that repaired")
		n.must(n.GC(t.Context()))
		same("GC")
		n.wantNoTrace(stays)
	})
}

// TestForeignComparisonFails: the comparison of foreign rules fails for each rule that is lost
// or made again.
func TestForeignComparisonFails(t *testing.T) {
	onThese(t, []setup{bridgeIPTables}, func(t *testing.T, n *node) {
		n.others()
		losses := []string{
			"nft delete table inet kube2iam-cni",
			"nft delete element ip somebody routed { 169.254.169.254 . 80 : continue }",
			"nft flush set bridge somebody held",
			"nft flush chain ip6 somebody KUBE2IAM-CNI",
		}
		for _, family := range []string{"ip", "ip6", "inet", "bridge", "arp", "netdev"} {
			losses = append(losses, "nft flush chain "+family+" somebody guard")
		}
		for _, form := range forms {
			losses = append(losses,
				form+" -t nat -D PREROUTING 2", form+" -t nat -F KUBE-SERVICES", form+" -t nat -F KUBE2IAM-CNI-OF-OTHERS",
				form+" -t nat -X KUBE2IAM-CNI-OF-OTHERS", form+" -D FORWARD 2", form+" -t mangle -D POSTROUTING 1")
		}
		for _, loss := range losses {
			before := n.foreign()
			n.onNode(loss)
			if n.foreign() == before {
				t.Errorf("not noticed: %s", loss)
			}
		}
		before := n.foreign()
		n.onNode("nft add rule arp somebody guard counter")
		once := n.foreign()
		n.onNode("nft flush chain arp somebody guard")
		if n.foreign() != before {
			t.Error("noticed, though nothing is left of it")
		}
		n.onNode("nft add rule arp somebody guard counter")
		if n.foreign() == once {
			t.Error("not noticed: a rule that was made again")
		}
	})
}
