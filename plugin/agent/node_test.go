package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/fsnotify/fsnotify"

	"github.com/kube2iam-cni/kube2iam-cni/test/netnstest"
	"github.com/kube2iam-cni/kube2iam-cni/test/testhost"
)

// testNode is a host with the plugin's binary and the directories of a container runtime.
type testNode struct {
	*testhost.Host
	plugin           string
	conf, bin, cache string
	env              []string
}

const primary = `{
  "cniVersion": "1.0.0",
  "name": "pods",
  "plugins": [
    { "type": "ptp", "ipam": {"type": "host-local"} }
  ]
}
`

func newNode(t *testing.T, backend string) *testNode {
	plugin, err := buildPlugin()
	if err != nil {
		t.Fatal(err)
	}
	n := &testNode{Host: testhost.New(t, "routed", backend), plugin: plugin}
	root := t.TempDir()
	n.conf, n.bin, n.cache = filepath.Join(root, "net.d"), filepath.Join(root, "bin"), filepath.Join(root, "cni")
	for _, dir := range []string{n.conf, n.bin, filepath.Join(n.cache, "results")} {
		n.Must(os.MkdirAll(dir, 0o755))
	}
	n.Must(os.WriteFile(filepath.Join(n.conf, "10-pods.conflist"), []byte(primary), 0o644))
	n.env = []string{"PATH=" + n.Commands, "XTABLES_LOCKFILE=" + os.Getenv("XTABLES_LOCKFILE")}
	return n
}

// cni runs a command of the plugin.
func (n *testNode) cni(command string, args *skel.CmdArgs) outcome {
	n.Helper()
	return outcomeOf(n.T, exec.Command(n.plugin), append(n.env, "CNI_COMMAND="+command, "CNI_CONTAINERID="+args.ContainerID, "CNI_IFNAME="+args.IfName,
		"CNI_NETNS="+args.Netns, "CNI_ARGS="+args.Args), args.StdinData)
}

// add attaches a container with an address in the pod's namespace.
func (n *testNode) add(containerID string, pod *netnstest.Netns, ip string) {
	n.Helper()
	if got := n.cni("ADD", n.Args(containerID, pod, ip)); got.Code != 0 {
		n.Fatalf("ADD: %+v", got)
	}
}

// command runs a command of the agent with the node's directories.
func (n *testNode) command(args ...string) outcome {
	n.Helper()
	if args[0] == "install" {
		args = append(args, "--plugin", n.plugin)
	}
	args = append(args, "--state-dir", n.StateDir, "--backend", n.Backend, "--cni-conf-dir", n.conf, "--cni-bin-dir", n.bin, "--cni-cache-dir", n.cache)
	return runBinary(n.T, n.env, args...)
}

// writeCache writes an attachment into the runtime's cache, with the network configuration of its
// ADD.
func (n *testNode) writeCache(chain string) {
	n.Helper()
	entry, err := json.Marshal(map[string]any{
		"kind": "cniCacheV1", "containerId": "c1", "ifName": "eth0", "networkName": "pods", "config": []byte(chain),
		"cniArgs": [][2]string{{"K8S_POD_NAMESPACE", "team"}, {"K8S_POD_NAME", "c1"}, {"K8S_POD_UID", "uid-c1"}},
		"result":  map[string]any{"cniVersion": "1.0.0", "ips": []any{map[string]string{"address": testhost.Pod4 + "/24"}}},
	})
	n.Must(err)
	n.Must(os.WriteFile(filepath.Join(n.cache, "results", "pods-c1-eth0"), entry, 0o600))
}

// agentProcess is an agent in another process.
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

func (a *agentProcess) output() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.log.String()
}

// flags returns the flags of an agent of this node. Additional ones override them.
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
		a.end(syscall.SIGTERM) // the agent removes the lock file
		if n.Failed() {
			n.Logf("agent %d %q:\n%s", a.cmd.Process.Pid, a.flags, a.output())
		}
	})
}

// end ends the process with a signal, and returns its exit status: -1 if the signal killed it.
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

// eventually polls a condition for at most a minute.
func (n *testNode) eventually(what string, condition func() bool) {
	n.Helper()
	for end := time.Now().Add(time.Minute); !condition(); time.Sleep(10 * time.Millisecond) {
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
	n.eventually("the second agent waits", func() bool { return strings.Contains(a.output(), waits) })
}

// configHistory has the texts of the network configuration after each change.
type configHistory struct {
	mu    sync.Mutex
	texts []string
}

func (n *testNode) watchConfig() *configHistory {
	n.Helper()
	watcher, err := fsnotify.NewWatcher()
	n.Must(err)
	n.Must(watcher.Add(n.conf))
	n.Cleanup(func() { watcher.Close() })
	h := &configHistory{}
	go func() {
		for event := range watcher.Events {
			if filepath.Base(event.Name) == "10-pods.conflist" {
				text, _ := os.ReadFile(event.Name)
				h.mu.Lock()
				h.texts = append(h.texts, string(text))
				h.mu.Unlock()
			}
		}
	}()
	return h
}

func (h *configHistory) all() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.texts
}

// rewrite replaces the network configuration as the primary CNI does at an upgrade.
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
