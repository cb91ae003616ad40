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

// round runs one round of the agent and returns its log.
func (n *node) round(flags ...string) string {
	n.t.Helper()
	log, err := n.AgentRound(n.t.Context(), append([]string{"--backend", n.backend}, flags...)...)
	n.must(err)
	return log
}

// wantIdle wants a round to log nothing and to change nothing.
func (n *node) wantIdle() {
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

// TestFlushedRules: pods whose redirections are flushed are refused until a round repairs them.
// Rules of others stay.
func TestFlushedRules(t *testing.T) {
	onEach(t, func(t *testing.T, n *node) {
		n.proxy(impatient...)
		one, two := n.run("one", "app"), n.run("two", "other")
		n.round() // guards the uplinks
		n.wantIdle()
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
		n.wantIdle()

		n.flushAll()
		n.round()
		n.wantOwn(one, "app")
		n.wantOwn(two, "other")
		if diff := cmp.Diff(sortedLines(withoutChains(rules)), sortedLines(withoutChains(n.rules()))); diff != "" {
			t.Errorf("rules before everything was flushed and after the round (-before +after):\n%s", diff)
		}
		n.wantIdle()
		n.wantOnlyTheNodeAsked()
	})
}

func sortedLines(s string) []string {
	lines := strings.Split(s, "\n")
	slices.Sort(lines)
	return lines
}

// withoutChains returns the rules without the tables and built-in chains of iptables, which its
// commands make as needed.
func withoutChains(rules string) string {
	var kept []string
	for line := range strings.Lines(rules) {
		if !tableOrChain.MatchString(line) {
			kept = append(kept, strings.TrimSpace(line))
		}
	}
	return strings.Join(kept, "\n")
}

var tableOrChain = regexp.MustCompile(`-save: (:|\*|COMMIT)`)

// TestReboot: after a reboot state directory, rules and sandboxes are gone. Once the agent has
// run, no new pod reaches the real service, and each gets its own credentials.
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

// TestRunningAgentRepairs: a running agent repairs flushed rules by itself, and its end changes
// nothing.
func TestRunningAgentRepairs(t *testing.T) {
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
