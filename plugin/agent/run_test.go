package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/fsnotify/fsnotify"

	"github.com/kube2iam-cni/kube2iam-cni/test/testhost"
)

// agentProcess is an agent that runs as a process of its own.
type agentProcess struct {
	t     *testing.T
	cmd   *exec.Cmd
	flags []string
	ended chan struct{}

	mu  sync.Mutex
	log bytes.Buffer
}

func (a *agentProcess) Write(text []byte) (int, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.log.Write(text)
}

func (a *agentProcess) said() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.log.String()
}

// flags are those of an agent of this node, with more that win over them.
func (n *testNode) flags(more ...string) []string {
	return append([]string{
		"--state-dir", n.StateDir, "--backend", n.Backend, "--cni-conf-dir", n.conf, "--cni-bin-dir", n.bin, "--cni-cache-dir", n.cache, "--interval", "1s", "--plugin", n.plugin,
	}, more...)
}

// start runs the agent until the test ends.
func (n *testNode) start(more ...string) *agentProcess {
	n.Helper()
	self, err := os.Executable()
	n.Must(err)
	a := &agentProcess{t: n.T, flags: n.flags(more...), ended: make(chan struct{})}
	a.cmd = exec.Command(self, append([]string{"run"}, a.flags...)...)
	a.cmd.Stdout, a.cmd.Stderr = a, a
	a.cmd.Env = append(n.env, agentEnv(n.T)...)
	n.launch(a)
	return a
}

// launch starts the process from this thread, and ends it with the test.
func (n *testNode) launch(a *agentProcess) {
	n.Helper()
	a.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	n.Must(a.cmd.Start())
	go func() {
		a.cmd.Wait()
		close(a.ended)
	}()
	n.Cleanup(func() {
		a.end(syscall.SIGTERM) // which removes the lock's file
		if n.Failed() {
			n.Logf("agent %d %q:\n%s", a.cmd.Process.Pid, a.flags, a.said())
		}
	})
}

// end ends the process by a signal, and returns its exit status, -1 where the signal killed it.
func (a *agentProcess) end(signal syscall.Signal) int {
	a.cmd.Process.Signal(signal)
	<-a.ended
	return a.cmd.ProcessState.ExitCode()
}

// ready runs `ready` with the flags of the agent.
func (n *testNode) ready(flags ...string) outcome {
	n.Helper()
	return runBinary(n.T, n.env, append([]string{"ready"}, flags...)...)
}

// eventually waits until something holds, for as long as the test may take.
func (n *testNode) eventually(what string, holds func() bool) {
	n.Helper()
	for end := time.Now().Add(time.Minute); !holds(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			n.Fatalf("not within a minute: %s", what)
		}
	}
}

func (n *testNode) eventuallyReady(flags ...string) {
	n.Helper()
	n.eventually("ready", func() bool { return n.ready(flags...).Code == 0 })
}

const waits = "waiting until it ends, and changing nothing"

func (n *testNode) eventuallyWaits(a *agentProcess) {
	n.Helper()
	n.eventually("the second agent waits", func() bool { return strings.Contains(a.said(), waits) })
}

// writes counts the changes of the network configuration, and keeps what stood there after each.
type writes struct {
	mu    sync.Mutex
	texts []string
}

func (n *testNode) watchConf() *writes {
	n.Helper()
	watcher, err := fsnotify.NewWatcher()
	n.Must(err)
	n.Must(watcher.Add(n.conf))
	n.Cleanup(func() { watcher.Close() })
	w := &writes{}
	go func() {
		for event := range watcher.Events {
			if filepath.Base(event.Name) == "10-pods.conflist" {
				text, _ := os.ReadFile(event.Name)
				w.mu.Lock()
				w.texts = append(w.texts, string(text))
				w.mu.Unlock()
			}
		}
	}()
	return w
}

func (w *writes) all() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.texts
}

// rewrite has the primary CNI write its configuration anew, as it does at an upgrade.
func (n *testNode) rewrite() {
	n.Helper()
	path := filepath.Join(n.conf, "10-pods.conflist")
	n.Must(errors.Join(os.WriteFile(path+".new", []byte(primary), 0o644), os.Rename(path+".new", path)))
}

func (n *testNode) isChained(stateDir string) bool {
	text, err := os.ReadFile(filepath.Join(n.conf, "10-pods.conflist"))
	n.Must(err)
	return strings.Contains(string(text), pluginName) && strings.Contains(string(text), `"`+stateDir+`"`)
}

// TestOneAgentChangesANode starts a second agent whose state directory is another one. Without a lock
// between them, each writes its own entry over the other's, and takes the other's rules for stale.
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
			w := n.watchConf()

			other := filepath.Join(t.TempDir(), "other")
			second := n.start("--install", "--state-dir", other)
			n.eventuallyWaits(second)
			named := fmt.Sprintf("PID %d (", first.cmd.Process.Pid)
			if said := second.said(); !strings.Contains(said, named) || !strings.Contains(said, "--install") || !strings.Contains(said, "state directory "+n.StateDir) {
				t.Errorf("it does not name the first: %s", said)
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
				t.Errorf("a round beside the agent: %+v", got)
			}
			if got := n.command("uninstall"); got.Code != 1 || !strings.Contains(got.Stderr, named) {
				t.Errorf("an uninstall beside the agent: %+v", got)
			}
			// The first goes on alone: the kernel tells both of the changes.
			n.rewrite()
			n.eventually("chained again", func() bool { return n.isChained(n.StateDir) })
			n.Run("nft flush ruleset")
			n.eventually("rules again", func() bool { return len(n.Redirections()) == 1 })
			// ADD and DEL do not wait.
			n.add("c2", n.NewPod("routed", "veth2", "10.1.0.6", "fd00:1::6"), "10.1.0.6")
			if got := n.cni("DEL", n.Args("c2", n.Pod, "10.1.0.6")); got.Code != 0 {
				t.Errorf("DEL: %+v", got)
			}
			count := len(w.all())
			for _, text := range w.all() {
				if strings.Contains(text, other) {
					t.Errorf("the second wrote\n%s", text)
				}
			}
			if count > 5 { // the primary's rename, and the exchange
				t.Errorf("%d changes of the network configuration", count)
			}
			if _, err := os.Stat(other); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the second's state directory: %v", err)
			}
			if said := second.said(); strings.Count(said, "\n") != 1 {
				t.Errorf("while it waits it says more: %s", said)
			}

			if code := first.end(by); by == syscall.SIGTERM && code != 0 {
				t.Errorf("the first ended with %d", code)
			}
			n.eventuallyReady(second.flags...)
			if !n.isChained(other) {
				t.Error("the second does not take over")
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
				t.Errorf("a round without an agent: %+v", got)
			}
			n.StateDir = other
			if got := n.command("uninstall"); got.Code != 0 {
				t.Errorf("an uninstall without an agent: %+v", got)
			}
		})
	}
}

// TestSecondAgentWaitsWhateverItsFlags has each flag differ that says where something is. An agent
// that waits ends at once when it is told to.
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
		if code := a.end(syscall.SIGTERM); code != 0 || !strings.Contains(a.said(), "stopped while waiting") {
			t.Errorf("%q ended with %d: %s", flags, code, a.said())
		}
	}
}

// TestMissingEntryIsNoticed has an agent without --install, as one may be run beside an entry by hand.
func TestMissingEntryIsNoticed(t *testing.T) {
	n := newNode(t, "nftables")
	a := n.start()
	const warning = "the entry is missing"
	missing := "guard and rules in place; the plugin is not in the chain of " + filepath.Join(n.conf, "10-pods.conflist")
	for times := 1; times <= 2; times++ {
		n.eventually("not ready", func() bool { return strings.Contains(n.ready(a.flags...).Stderr, missing) })
		if count := strings.Count(a.said(), warning); count != times {
			t.Errorf("missing for the %d. time: %d warnings in %s", times, count, a.said())
		}
		if got := n.ready(); got.Code != 1 {
			t.Errorf("ready: %+v", got)
		}
		if got := n.command("install"); got.Code != 0 { // by hand, beside the agent
			t.Fatalf("install: %+v", got)
		}
		n.eventuallyReady(a.flags...)
		if got := n.ready(); !strings.Contains(got.Stdout, "guard and rules in place; entry chained in "+n.conf+"\n") {
			t.Errorf("ready says %q", got.Stdout)
		}
		n.rewrite()
	}
}

// TestReadyOfAnotherContainer has an agent in a container of its own, and asks from another one, whose
// probe has no flags but --host-root.
func TestReadyOfAnotherContainer(t *testing.T) {
	n := newNode(t, "nftables")
	a := n.start("--install", "--host-root", "/")
	n.eventuallyReady(a.flags...)
	if got := n.ready("--host-root", "/"); got.Code != 0 {
		t.Errorf("in its own container: %+v", got)
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
