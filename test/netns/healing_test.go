package netns

import (
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

// round has the agent make one round.
func (n *node) round(flags ...string) string {
	n.t.Helper()
	log, err := n.AgentRound(n.t.Context(), append([]string{"--backend", n.backend}, flags...)...)
	n.must(err)
	return log
}

// wantQuiet wants that a round finds nothing to do, and does nothing.
func (n *node) wantQuiet() {
	n.t.Helper()
	rules, records := n.rules(), n.records()
	if log := n.round(); log != "" {
		n.t.Errorf("a round with nothing to do said\n%s", log)
	}
	if diff := cmp.Diff(rules, n.rules()); diff != "" {
		n.t.Errorf("a round with nothing to do changed rules (-before +after):\n%s", diff)
	}
	if diff := cmp.Diff(records, n.records()); diff != "" {
		n.t.Errorf("a round with nothing to do changed records (-before +after):\n%s", diff)
	}
}

// others makes rules of other programs, in every form, next to where ours are.
func (n *node) others() {
	n.t.Helper()
	for _, form := range []string{"iptables-nft", "iptables-legacy"} {
		for _, rule := range []string{
			"-t nat -N KUBE-SERVICES",
			"-t nat -A PREROUTING -m comment --comment kube -j KUBE-SERVICES",
			"-t nat -A KUBE-SERVICES -d 10.96.0.1/32 -p tcp -m tcp --dport 443 -j DNAT --to-destination 10.200.0.9:6443",
			"-t nat -A PREROUTING -d 169.254.169.254/32 -i docker0 -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.0.0.1:8181",
			"-t filter -A FORWARD -s 10.99.0.0/16 -j ACCEPT",
			"-t mangle -A POSTROUTING -d 10.99.0.0/16 -j ACCEPT",
		} {
			n.onNode(form + " " + rule)
		}
	}
	for _, family := range []string{"bridge", "ip", "ip6", "inet"} {
		n.onNode("nft add table " + family + " somebody")
		n.onNode("nft add chain " + family + " somebody early { type filter hook prerouting priority -10 ; }")
		n.onNode("nft add set " + family + " somebody held4 { type ipv4_addr ; }")
		n.onNode("nft add element " + family + " somebody held4 { 169.254.169.254, 10.201.0.2 }")
	}
	for _, family := range []string{"bridge", "ip", "inet"} {
		n.onNode("nft add rule " + family + " somebody early ip daddr 169.254.169.254 counter")
	}
	n.onNode("nft add table netdev somebody")
	n.onNode("nft add chain netdev somebody enter { type filter hook ingress device eth0 priority 0 ; }")
	n.onNode("nft add rule netdev somebody enter ip saddr 169.254.169.254 counter")
}

var ofOurs = regexp.MustCompile(`(?i)kube2iam`)

// foreign is all that stands of others, but for counters: tables of iptables by its own words, those of nftables by nft's.
func (n *node) foreign() string {
	n.t.Helper()
	var kept []string
	for _, command := range []string{"iptables-nft", "ip6tables-nft", "iptables-legacy", "ip6tables-legacy"} {
		kept = append(kept, command)
		for line := range strings.Lines(n.onNode(command + "-save")) {
			if strings.HasPrefix(line, ":") {
				line, _, _ = strings.Cut(line, " [")
			}
			if !ofOurs.MatchString(line) && !strings.HasPrefix(line, "#") {
				kept = append(kept, strings.TrimSpace(line))
			}
		}
	}
	for line := range strings.Lines(n.onNode("nft list tables")) {
		words := strings.Fields(line) // "table", its family, its name
		if iptables := slices.Contains([]string{"nat", "filter", "mangle"}, words[2]); !iptables && !ofOurs.MatchString(words[2]) {
			kept = append(kept, n.onNode("nft -s list "+strings.TrimSpace(line)))
		}
	}
	return strings.Join(kept, "\n")
}

// TestFlushedRules is a node whose redirections somebody flushes: pods are refused, and have their credentials again after a
// round. What is others' is as it was, through it all.
func TestFlushedRules(t *testing.T) {
	onEach(t, func(t *testing.T, n *node) {
		n.proxy(impatient...)
		one, two := n.run("one", "app"), n.run("two", "other")
		n.wantQuiet()
		rules := n.rules()
		n.flush()
		for _, s := range []*testbed.Sandbox{one, two} {
			if got := n.get(s, credentials); !got.refused() {
				t.Errorf("%s, flushed: %s, want a refused connection", s.Name, got)
			}
		}
		if log := n.round(); !strings.Contains(log, "repaired the node's rules") {
			t.Errorf("the agent said %q", log)
		}
		if diff := cmp.Diff(sortedLines(rules), sortedLines(n.rules())); diff != "" {
			t.Errorf("rules before the flush and after the round (-before +after):\n%s", diff)
		}
		n.wantOwn(one, "app")
		n.wantOwn(two, "other")
		n.wantQuiet()

		n.flushAll()
		n.round()
		n.wantOwn(one, "app")
		n.wantOwn(two, "other")
		if diff := cmp.Diff(sortedLines(withoutChains(rules)), sortedLines(withoutChains(n.rules()))); diff != "" {
			t.Errorf("rules before everything was flushed and after the round (-before +after):\n%s", diff)
		}
		n.wantQuiet()
		n.wantOnlyTheNodeAsked()
	})
}

func sortedLines(s string) []string {
	lines := strings.Split(s, "\n")
	for i := range lines {
		for j := i + 1; j < len(lines); j++ {
			if lines[j] < lines[i] {
				lines[i], lines[j] = lines[j], lines[i]
			}
		}
	}
	return lines
}

// withoutChains leaves out which of its tables and built-in chains an iptables command has made.
func withoutChains(rules string) string {
	var kept []string
	for line := range strings.Lines(rules) {
		if !strings.HasPrefix(line, ":") && !strings.HasPrefix(line, "*") && !strings.HasPrefix(line, "COMMIT") {
			kept = append(kept, strings.TrimSpace(line))
		}
	}
	return strings.Join(kept, "\n")
}

// TestOthersRulesSurvive compares what is others' byte for byte before anything of ours and after everything.
func TestOthersRulesSurvive(t *testing.T) {
	onEach(t, func(t *testing.T, n *node) {
		n.others()
		before := n.foreign()
		same := func(after string) {
			t.Helper()
			if diff := cmp.Diff(before, n.foreign()); diff != "" {
				t.Errorf("others' rules after %s (-before +after):\n%s", after, diff)
			}
		}
		n.round()
		same("the agent's first round")
		pod := n.run("pod", "app")
		same("ADD")
		n.must(n.AddAgain(t.Context(), pod, pod.Result))
		same("a second ADD")
		n.unattend(pod)
		n.round()
		same("a round that collected")
		n.must(n.Del(t.Context(), pod.Runtime()))
		same("a late DEL")
		stays := n.run("stays", "app")
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

		// That it would be seen.
		for _, change := range []string{
			"iptables-nft -t nat -D KUBE-SERVICES 1", "iptables-legacy -t mangle -F POSTROUTING", "nft flush chain bridge somebody early",
			"nft delete element ip6 somebody held4 { 10.201.0.2 }", "nft delete table inet somebody", "nft flush chain netdev somebody enter",
		} {
			before := n.foreign()
			n.onNode(change)
			if n.foreign() == before {
				t.Errorf("%s is not seen", change)
			}
		}
	})
}

// TestReboot is a node whose state directory and rules are gone, and whose pods' sandboxes are new.
func TestReboot(t *testing.T) {
	onEach(t, func(t *testing.T, n *node) {
		p := n.proxy(impatient...)
		before := n.run("before", "other")
		n.must(p.Stop())
		n.must(n.StopPod(t.Context(), before))
		n.flushAll()
		n.must(os.RemoveAll(n.StateDir))
		// The agent comes first: no pod that comes before the plugin's first ADD has a way out.
		n.round()
		chain := n.SetChain()
		old := n.run("old", "app")
		for _, path := range []string{credentials, "/latest/meta-data/instance-id"} {
			if got := n.get(old, path); !got.refused() {
				t.Errorf("a pod after the reboot asks for %s: %s, want a refused connection", path, got)
			}
		}
		n.SetChain(chain...)
		n.proxy(impatient...)
		n.wantOwn(n.run("new", "app"), "app")
		n.round()
		n.wantOwn(old, "app")
		n.wantOnlyTheNodeAsked()
	})
}

// TestAgentLives is the agent as it runs: it repairs what is flushed by itself, and its end changes nothing.
func TestAgentLives(t *testing.T) {
	onEach(t, func(t *testing.T, n *node) {
		p := n.proxy(impatient...)
		interval := "1h" // the kernel tells
		if n.backend == "iptables-legacy" {
			interval = "1s"
		}
		agent, err := n.StartAgent("--backend", n.backend, "--interval", interval)
		n.must(err)
		pod := n.run("pod", "app")
		n.wantOwn(pod, "app")
		n.flush()
		n.eventually(func() bool { return n.get(pod, credentials).status == http.StatusOK })
		n.wantOwn(pod, "app")
		n.flushAll()
		n.eventually(func() bool { return n.Check(t.Context(), pod) == nil })
		n.wantOwn(pod, "app")
		n.IMDS.Reset()

		rules, records := n.rules(), n.records()
		n.must(agent.Stop())
		if diff := cmp.Diff(rules, n.rules()); diff != "" {
			t.Errorf("rules before the agent's end and after it (-before +after):\n%s", diff)
		}
		if diff := cmp.Diff(records, n.records()); diff != "" {
			t.Errorf("records before the agent's end and after it (-before +after):\n%s", diff)
		}
		n.wantOwn(pod, "app")
		n.flush()
		refused := func(when string) {
			t.Helper()
			if got := n.get(pod, credentials); !got.refused() {
				t.Errorf("%s: %s, want a refused connection", when, got)
			}
		}
		refused("flushed, the agent stopped")
		n.must(p.Stop())
		refused("flushed, the agent and the proxy stopped")
		n.round()
		refused("repaired, the proxy stopped")
		n.proxy(impatient...)
		n.wantOwn(pod, "app")
		n.wantOnlyTheNodeAsked()
	})
}
