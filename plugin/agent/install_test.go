package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/google/go-cmp/cmp"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/agent"
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

// cached is an attachment that the runtime remembers as one through a chain.
func (n *testNode) cached(chain string) {
	n.Helper()
	entry, err := json.Marshal(map[string]any{
		"kind": "cniCacheV1", "containerId": "c1", "ifName": "eth0", "networkName": "pods", "config": []byte(chain),
		"cniArgs": [][2]string{{"K8S_POD_NAMESPACE", "team"}, {"K8S_POD_NAME", "c1"}, {"K8S_POD_UID", "uid-c1"}},
		"result":  map[string]any{"cniVersion": "1.0.0", "ips": []any{map[string]string{"address": testhost.Pod4 + "/24"}}},
	})
	n.Must(err)
	n.Must(os.WriteFile(filepath.Join(n.cache, "results", "pods-c1-eth0"), entry, 0o600))
}

func TestUninstallLeavesTheNodeAsItWasBeforeInstall(t *testing.T) {
	for _, backend := range []string{"iptables", "nftables"} {
		t.Run(backend, func(t *testing.T) {
			n := newNode(t, backend)
			// What a node has in any case, and more that is not ours.
			for _, command := range []string{"iptables", "ip6tables"} {
				for _, rule := range []string{"-t nat -A PREROUTING -p tcp --dport 81 -j ACCEPT", "-t filter -A FORWARD -p tcp --dport 81 -j ACCEPT", "-t mangle -A POSTROUTING -p tcp --dport 81 -j ACCEPT"} {
					n.Run(command + " " + rule)
				}
			}
			before := n.Rules()
			if got := n.command("install"); got.Code != 0 || !strings.Contains(got.Stdout, "program "+n.bin) || !strings.Contains(got.Stdout, "entry in "+n.conf) {
				t.Fatalf("install: %+v", got)
			}
			if got := n.command("install"); got != (outcome{0, "nothing to do\n", ""}) {
				t.Errorf("install again: %+v", got)
			}
			text, err := os.ReadFile(filepath.Join(n.conf, "10-pods.conflist"))
			n.Must(err)
			var list struct{ Plugins []map[string]any }
			n.Must(json.Unmarshal(text, &list))
			want := map[string]any{"type": "kube2iam-cni", "stateDir": n.StateDir, "backend": backend}
			if diff := cmp.Diff(want, list.Plugins[len(list.Plugins)-1]); diff != "" {
				t.Errorf("the entry: %s", diff)
			}
			plugin, err := os.ReadFile(n.plugin)
			n.Must(err)
			if program, err := os.ReadFile(filepath.Join(n.bin, pluginName)); err != nil || !bytes.Equal(program, plugin) {
				t.Errorf("the program is another: %v", err)
			}
			n.add("c1", n.Pod, testhost.Pod4)
			if len(n.Redirections()) != 1 {
				t.Fatalf("after ADD: %v", n.Redirections())
			}

			lock, err := agent.WaitForLock(t.Context(), agent.Info{PID: os.Getpid(), StateDir: "/elsewhere"}, nil)
			n.Must(err)
			during := n.Rules()
			if got := n.command("uninstall"); got.Code != 1 || !strings.Contains(got.Stderr, "delete its DaemonSet") || !strings.Contains(got.Stderr, "state directory /elsewhere") || n.Rules() != during {
				t.Errorf("uninstall while the agent runs: %+v", got)
			}
			lock.Unlock()

			n.cached(string(text))
			if got := n.command("uninstall"); got.Code != 0 || !strings.Contains(got.Stdout, "of 1 attachments removed") || !strings.Contains(got.Stdout, "1 pods were attached through it") {
				t.Errorf("uninstall: %+v", got)
			}
			if diff := cmp.Diff(before, n.Rules()); diff != "" {
				t.Errorf("rules (-before +after):\n%s", diff)
			}
			if now, err := os.ReadFile(filepath.Join(n.conf, "10-pods.conflist")); err != nil || string(now) != primary {
				t.Errorf("the configuration is %s, %v", now, err)
			}
			if _, err := os.Stat(n.StateDir); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the state directory: %v", err)
			}
			// The program that was left is there for the DEL of a runtime that goes by what it remembers.
			args := n.Args("c1", n.Pod, testhost.Pod4)
			if got := n.cni("DEL", args); got != (outcome{}) {
				t.Errorf("DEL: %+v", got)
			}
			if diff := cmp.Diff(before, n.Rules()); diff != "" {
				t.Errorf("rules after the DEL (-before +after):\n%s", diff)
			}
			n.Must(os.Remove(filepath.Join(n.cache, "results", "pods-c1-eth0")))
			if got := n.command("uninstall"); got.Code != 0 || !strings.Contains(got.Stdout, "program "+n.bin+"/"+pluginName+" removed") {
				t.Errorf("uninstall again: %+v", got)
			}
			if left, err := os.ReadDir(n.bin); err != nil || len(left) > 0 {
				t.Errorf("left in the program directory: %v, %v", left, err)
			}
			if got := n.command("uninstall"); got != (outcome{0, "rules and state of 0 attachments removed\n", ""}) {
				t.Errorf("uninstall of nothing: %+v", got)
			}
		})
	}
}

// TestUninstallOfOtherPlacesIsRefused has it be told of a directory that no runtime reads, and of another state directory than the entry's: it
// would leave the plugin chained, and say that it is done.
func TestUninstallOfOtherPlacesIsRefused(t *testing.T) {
	n := newNode(t, "auto")
	if got := n.command("install"); got.Code != 0 {
		t.Fatalf("install: %+v", got)
	}
	state := n.StateDir
	n.StateDir = filepath.Join(t.TempDir(), "other")
	if got := n.command("uninstall"); got.Code != 1 || !strings.Contains(got.Stderr, "the entry's stateDir is "+state) {
		t.Errorf("another state directory: %+v", got)
	}
	conf := n.conf
	n.StateDir, n.conf = state, filepath.Join(t.TempDir(), "none")
	if got := n.command("uninstall"); got.Code != 1 || !strings.Contains(got.Stderr, "is --cni-conf-dir where") {
		t.Errorf("another configuration directory: %+v", got)
	}
	n.conf = conf
	if got := n.command("uninstall"); got.Code != 0 {
		t.Errorf("the right ones: %+v", got)
	}
}

// TestInstallWaitsForAFileThatIsBeingWritten has it be broken for good, and written just now.
func TestInstallWaitsForAFileThatIsBeingWritten(t *testing.T) {
	n := newNode(t, "auto")
	n.Must(os.WriteFile(filepath.Join(n.conf, "05-x.conflist"), []byte("{"), 0o644))
	if got := n.command("install"); got.Code != 0 || !strings.Contains(got.Stdout, "entry in "+n.conf+"/10-pods.conflist") {
		t.Errorf("install: %+v", got)
	}
}

func TestInstallSaysWhatKeepsItFromIt(t *testing.T) {
	n := newNode(t, "auto")
	n.Must(os.Remove(filepath.Join(n.conf, "10-pods.conflist")))
	if got := n.command("install"); got.Code != 1 || !strings.Contains(got.Stderr, "the primary CNI has to be installed first") {
		t.Errorf("without a network: %+v", got)
	}
	if got := n.command("install", "--proxy-port", "0"); got.Code != 1 || !strings.Contains(got.Stderr, "proxyPort") {
		t.Errorf("an entry that the plugin would refuse: %+v", got)
	}
	if got := n.command("install", "--host-root", "/nowhere"); got.Code != 1 || !strings.Contains(got.Stderr, "--host-root /nowhere") {
		t.Errorf("no host: %+v", got)
	}
	n.Must(os.RemoveAll(n.bin))
	if got := n.command("install"); got.Code != 1 || !strings.Contains(got.Stderr, "the plugin's program") {
		t.Errorf("without a program directory: %+v", got)
	}
}
