package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/kube2iam-cni/kube2iam-cni/test/testhost"
)

// TestOneAgentChangesANode starts a second agent with another state directory. Without the lock,
// each agent would replace the other's entry, and remove the other's rules as stale.
func TestOneAgentChangesANode(t *testing.T) {
	for _, by := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
		t.Run("the first ends by "+by.String(), func(t *testing.T) {
			n := newNode(t, "nftables")
			first := n.start("--install")
			n.eventuallyReady(first.flags...)
			n.add("c1", n.Pod, testhost.Pod4)
			if len(n.Redirections()) != 1 {
				t.Fatalf("after ADD: %v", n.Redirections())
			}
			history := n.watchConfig()

			other := filepath.Join(t.TempDir(), "other")
			second := n.start("--install", "--state-dir", other)
			n.eventuallyWaits(second)
			named := fmt.Sprintf("PID %d (", first.cmd.Process.Pid)
			if text := second.output(); !strings.Contains(text, named) || !strings.Contains(text, "--install") || !strings.Contains(text, "state directory "+n.StateDir) {
				t.Errorf("the first is not named: %s", text)
			}
			if got := n.ready(second.flags...); got.Code != 1 || !strings.Contains(got.Stderr, named) || !strings.Contains(got.Stderr, "state directory "+n.StateDir) {
				t.Errorf("ready of the second: %+v", got)
			}
			for _, flags := range [][]string{first.flags, nil} {
				if got := n.ready(flags...); got.Code != 0 || !strings.Contains(got.Stdout, named) || !strings.Contains(got.Stdout, "state directory "+n.StateDir) || !strings.Contains(got.Stdout, "guard and rules in place; program in "+n.bin+", entry chained in "+n.conf) {
					t.Errorf("ready with %q: %+v", flags, got)
				}
			}
			if got := n.command("run", "--once"); got.Code != 1 || !strings.Contains(got.Stderr, named) {
				t.Errorf("run --once while an agent runs: %+v", got)
			}
			if got := n.command("uninstall"); got.Code != 1 || !strings.Contains(got.Stderr, named) {
				t.Errorf("uninstall while an agent runs: %+v", got)
			}
			// Only the first agent acts, though the kernel notifies both of changes.
			n.rewrite()
			n.eventually("chained again", func() bool { return n.isChained(n.StateDir) })
			n.Run("nft flush ruleset")
			n.eventually("rules again", func() bool { return len(n.Redirections()) == 1 })
			// ADD and DEL do not wait for the agents.
			n.add("c2", n.NewPod("routed", "veth2", "10.1.0.6", "fd00:1::6"), "10.1.0.6")
			if got := n.cni("DEL", n.Args("c2", n.Pod, "10.1.0.6")); got.Code != 0 {
				t.Errorf("DEL: %+v", got)
			}
			count := len(history.all())
			for _, text := range history.all() {
				if strings.Contains(text, other) {
					t.Errorf("the second agent wrote\n%s", text)
				}
			}
			if count > 5 { // the primary CNI's rename and the agent's exchange
				t.Errorf("%d changes of the network configuration", count)
			}
			if _, err := os.Stat(other); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the second's state directory: %v", err)
			}
			if text := second.output(); strings.Count(text, "\n") != 1 {
				t.Errorf("the waiting agent logs more: %s", text)
			}

			if code := first.end(by); by == syscall.SIGTERM && code != 0 {
				t.Errorf("the first ended with %d", code)
			}
			n.eventuallyReady(second.flags...)
			if !n.isChained(other) {
				t.Error("the second agent does not take over")
			}
			if got := n.ready(first.flags...); got.Code != 1 || !strings.Contains(got.Stderr, fmt.Sprintf("PID %d (", second.cmd.Process.Pid)) {
				t.Errorf("ready of the first: %+v", got)
			}
			if code := second.end(syscall.SIGTERM); code != 0 {
				t.Errorf("the second ended with %d", code)
			}
			if got := n.ready(); got.Code != 1 || !strings.Contains(got.Stderr, "no agent runs") {
				t.Errorf("ready without an agent: %+v", got)
			}
			if got := n.command("run", "--once"); got.Code != 0 {
				t.Errorf("run --once without an agent: %+v", got)
			}
			n.StateDir = other
			if got := n.command("uninstall"); got.Code != 0 {
				t.Errorf("uninstall without an agent: %+v", got)
			}
		})
	}
}

// TestSecondAgentWaitsWhateverItsFlags changes one flag at a time. A waiting agent ends at SIGTERM.
func TestSecondAgentWaitsWhateverItsFlags(t *testing.T) {
	n := newNode(t, "nftables")
	n.start()
	n.eventually("an agent", func() bool { return !strings.Contains(n.ready().Stderr, "no agent") })
	for _, flags := range [][]string{
		{"--state-dir", filepath.Join(t.TempDir(), "other")}, {"--cni-conf-dir", t.TempDir()}, {"--cni-bin-dir", t.TempDir()}, {"--cni-cache-dir", t.TempDir()},
		{"--host-root", "/"}, {"--backend", "auto"}, {"--guard=false"}, {"--proxy-port", "9"}, nil,
	} {
		a := n.start(flags...)
		n.eventuallyWaits(a)
		if code := a.end(syscall.SIGTERM); code != 0 || !strings.Contains(a.output(), "stopped while waiting") {
			t.Errorf("%q ended with %d: %s", flags, code, a.output())
		}
	}
}

// TestAgentWithoutInstallWarnsOfMissingEntry covers an entry that the operator adds.
func TestAgentWithoutInstallWarnsOfMissingEntry(t *testing.T) {
	n := newNode(t, "nftables")
	a := n.start()
	const warning = "the entry is missing"
	missing := "guard and rules in place; the plugin is not in the chain of " + filepath.Join(n.conf, "10-pods.conflist")
	for times := 1; times <= 2; times++ {
		n.eventually("not ready", func() bool { return strings.Contains(n.ready(a.flags...).Stderr, missing) })
		if count := strings.Count(a.output(), warning); count != times {
			t.Errorf("%d. time without the entry: %d warnings in %s", times, count, a.output())
		}
		if got := n.ready(); got.Code != 1 {
			t.Errorf("ready: %+v", got)
		}
		if got := n.command("install"); got.Code != 0 { // as an operator does
			t.Fatalf("install: %+v", got)
		}
		n.eventuallyReady(a.flags...)
		if got := n.ready(); !strings.Contains(got.Stdout, "guard and rules in place; entry chained in "+n.conf+"\n") {
			t.Errorf("ready prints %q", got.Stdout)
		}
		n.rewrite()
	}
}

// TestReadyInAnotherContainer runs the DaemonSet's probe in another mount namespace than the
// agent's.
func TestReadyInAnotherContainer(t *testing.T) {
	n := newNode(t, "nftables")
	a := n.start("--install", "--host-root", "/")
	n.eventuallyReady(a.flags...)
	if got := n.ready("--host-root", "/"); got.Code != 0 {
		t.Errorf("in the agent's container: %+v", got)
	}
	self, err := os.Executable()
	n.Must(err)
	cmd := exec.Command("unshare", "--mount", self, "ready", "--host-root", "/")
	cmd.Env = append(n.env, agentEnv(t)...)
	out, err := cmd.CombinedOutput()
	if err == nil || !strings.Contains(string(out), fmt.Sprintf("the agent of this container waits for another one to end: PID %d (", a.cmd.Process.Pid)) {
		t.Errorf("in another container: %v: %s", err, out)
	}
}

// TestReadyWithAnAgentOfTheEnvironment runs the DaemonSet's probe in the environment of its
// container, which sets a key of the entry.
func TestReadyWithAnAgentOfTheEnvironment(t *testing.T) {
	n := newNode(t, "nftables")
	n.env = append(n.env, "KUBE2IAM_AGENT_PROXY_IP=192.0.2.1")
	a := n.start("--install", "--host-root", "/")
	n.eventuallyReady(a.flags...)
	if got := n.ready("--host-root", "/"); got.Code != 0 {
		t.Errorf("the probe: %+v", got)
	}
	if got := n.ready(append(a.flags, "--proxy-ip", "192.0.2.2")...); got.Code != 1 || !strings.Contains(got.Stderr, `--proxy-ip "192.0.2.1" instead of "192.0.2.2"`) {
		t.Errorf("with another flag: %+v", got)
	}
}
