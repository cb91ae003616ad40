package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/agent"
	"github.com/kube2iam-cni/kube2iam-cni/test/testhost"
)

func TestUninstallRestoresTheNode(t *testing.T) {
	for _, backend := range []string{"iptables", "nftables"} {
		t.Run(backend, func(t *testing.T) {
			n := newNode(t, backend)
			// The tables that every node has, and rules of another program.
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
				t.Errorf("another binary is installed: %v", err)
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

			n.writeCache(string(text))
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
			// Some runtimes call DEL from their cached configuration.
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
				t.Errorf("files in the directory of plugins: %v, %v", left, err)
			}
			if got := n.command("uninstall"); got != (outcome{0, "rules and state of 0 attachments removed\n", ""}) {
				t.Errorf("uninstall of nothing: %+v", got)
			}
		})
	}
}

// TestUninstallRefusesOtherDirectories covers a configuration directory that no runtime reads, and
// a state directory that is not the entry's. Uninstall would succeed and leave the plugin chained.
func TestUninstallRefusesOtherDirectories(t *testing.T) {
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
		t.Errorf("the node's directories: %+v", got)
	}
}
