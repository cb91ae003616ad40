//go:build cluster

package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/conflist"
)

const (
	stateDir   = "/run/kube2iam-cni"
	proxyPort  = "8181"
	pluginType = "kube2iam-cni"
	pluginFile = "/opt/cni/programs/" + pluginType
	confDir    = "/etc/cni/net.d"
	podsConfig = confDir + "/10-pods.conflist"
)

// daemonSets are the names of the DaemonSets, in the order of the manifests.
var daemonSets = []string{"kube2iam-cni-agent", "kube2iam-proxy"}

// install applies the manifests on a node that runs pods.
func install(t *testing.T, n *node) {
	t.Helper()
	n.must(t, "kubectl", "annotate", "namespace", "default", `iam.amazonaws.com/allowed-roles=["*"]`)
	began := time.Now()
	n.must(t, "kubectl", "apply", "--kustomize="+testdata(t, "overlay"))
	n.rolledOut(t)
	t.Logf("installed in %s", time.Since(began).Round(100*time.Millisecond))
}

// rolledOut waits until both DaemonSets are rolled out.
func (n *node) rolledOut(t *testing.T) {
	t.Helper()
	for _, name := range daemonSets {
		n.must(t, "kubectl", "rollout", "status", "daemonset/"+name, "--namespace=kube-system", "--timeout=110s")
	}
}

// testAdopted expects that the pod which got the node's credentials now gets its own.
func testAdopted(t *testing.T, n *node, _ *cloud) {
	await(t, podLimit, "the pod that came before has its own role", func(ctx context.Context) error {
		role, err := n.ask(ctx, t, unprotected, rolesPath)
		if err == nil && role != "team-a" {
			err = fmt.Errorf("it has %q", role)
		}
		return err
	})
}

// ruleset returns all rules of the node, each with its table and chain, without counters, and
// without the rules of kube-proxy and of the primary CNI for one pod.
func (n *node) ruleset(t *testing.T) string {
	t.Helper()
	var all []string
	table, chain := "", ""
	for line := range strings.Lines(n.must(t, "nft", "list", "ruleset")) {
		line = counters.ReplaceAllString(strings.TrimSpace(line), "")
		switch {
		case strings.HasPrefix(line, "table "):
			table, chain = line, ""
		case strings.HasPrefix(line, "chain "), strings.HasPrefix(line, "set "), strings.HasPrefix(line, "map "):
			chain = line
		}
		if line != "" && line != "}" && !strings.HasPrefix(line, "#") && !strings.Contains(table, "kube-proxy") && !strings.Contains(chain+line, "CNI-") {
			all = append(all, table+" "+chain+" "+line)
		}
	}
	slices.Sort(all)
	return strings.Join(append(all, n.must(t, "iptables-legacy-save"), n.must(t, "ip6tables-legacy-save")), "\n")
}

var counters = regexp.MustCompile(`counter packets \d+ bytes \d+ ?`)

// configuration returns the text of a network configuration of the node.
func (n *node) configuration(path string) (string, error) {
	text, err := os.ReadFile(n.path(path))
	return string(text), err
}

// chained waits until a file is a valid network configuration with these plugins and kube2iam-cni
// last.
func (n *node) chained(t *testing.T, path string, others ...string) {
	t.Helper()
	await(t, 30*time.Second, "the plugin chained in "+path, func(context.Context) error {
		text, err := n.configuration(path)
		if err != nil {
			return err
		}
		var list struct{ Plugins []struct{ Type string } }
		if err := json.Unmarshal([]byte(text), &list); err != nil {
			return err
		}
		var types []string
		for _, p := range list.Plugins {
			types = append(types, p.Type)
		}
		if !slices.Equal(types, append(slices.Clone(others), pluginType)) {
			return fmt.Errorf("its plugins are %q", types)
		}
		return nil
	})
}

// write writes a network configuration as a primary CNI does, by a rename.
func (n *node) write(t *testing.T, path, text string) {
	t.Helper()
	if err := errors.Join(os.WriteFile(n.path(path)+".tmp", []byte(text), 0o644), os.Rename(n.path(path)+".tmp", n.path(path))); err != nil {
		t.Fatal(err)
	}
}

// runtimeReads looks for a network as containerd does: by libcni, file by file.
func (n *node) runtimeReads() error {
	files, err := libcni.ConfFiles(n.path(confDir), []string{".conf", ".conflist", ".json"})
	if err != nil {
		return err
	}
	slices.Sort(files)
	for _, file := range files {
		if filepath.Ext(file) == ".conflist" {
			_, err = libcni.ConfListFromFile(file)
		} else {
			_, err = libcni.ConfFromFile(file)
		}
		if err == nil {
			return nil
		}
	}
	return fmt.Errorf("of %q: %w", files, err)
}

// testPrimary plays a primary CNI that rewrites and removes its configuration, replaces a lone
// plugin's file by a list, and adds another file. A reader checks that a runtime always finds a
// valid configuration.
func testPrimary(t *testing.T, n *node, _ *cloud) {
	text, err := n.configuration(podsConfig)
	if err != nil {
		t.Fatal(err)
	}
	n.chained(t, podsConfig, "bridge", "portmap")
	original, err := os.ReadFile(filepath.Join(n.scripts, "pods.conflist"))
	if err != nil {
		t.Fatal(err)
	}
	// A runtime reads the directory and uses the first valid file.
	stop := make(chan struct{})
	var none atomic.Bool // whether no valid configuration is expected
	var watcher sync.WaitGroup
	watched := 0
	watcher.Go(func() {
		for ; ; watched++ {
			select {
			case <-stop:
				return
			default:
			}
			expected := none.Load()
			if err := n.runtimeReads(); err != nil && !expected && !none.Load() {
				t.Errorf("for a moment a runtime finds no network: %v", err)
				return
			}
		}
	})
	for i := range 10 {
		// Each text is another, as in upgrades: the same one would be a conflict.
		n.write(t, podsConfig, string(original)+strings.Repeat("\n", i))
		n.chained(t, podsConfig, "bridge", "portmap")
	}
	// Another network that sorts first, and an invalid file before it.
	n.write(t, confDir+"/04-broken.conflist", `{"name": "broken", "plugins": [`)
	n.write(t, confDir+"/05-first.conflist", strings.Replace(string(original), `"name": "pods"`, `"name": "first"`, 1))
	n.chained(t, confDir+"/05-first.conflist", "bridge", "portmap")
	for _, name := range []string{"/04-broken.conflist", "/05-first.conflist"} {
		if err := os.Remove(n.path(confDir + name)); err != nil {
			t.Fatal(err)
		}
	}
	n.chained(t, podsConfig, "bridge", "portmap")

	// The file is removed, returns as a lone plugin's, and then as a list again.
	none.Store(true)
	if err := os.Remove(n.path(podsConfig)); err != nil {
		t.Fatal(err)
	}
	n.write(t, confDir+"/10-pods.conf", `{"cniVersion": "1.0.0", "name": "pods", "type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true,
		"ipam": {"type": "host-local", "ranges": [[{"subnet": "10.244.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}}`)
	none.Store(false)
	const made = confDir + "/10-pods-conf-kube2iam-cni.conflist"
	n.chained(t, made, "bridge")
	n.write(t, podsConfig, string(original))
	if err := os.Remove(n.path(confDir + "/10-pods.conf")); err != nil {
		t.Fatal(err)
	}
	n.chained(t, podsConfig, "bridge", "portmap")
	await(t, 30*time.Second, "the list gone that stood for it", func(context.Context) error {
		if _, err := os.Stat(n.path(made)); !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("it is there: %v", err)
		}
		return nil
	})
	close(stop)
	watcher.Wait()
	if watched < 100 {
		t.Errorf("it was looked at %d times", watched)
	}
	if got, err := n.configuration(podsConfig); err != nil || got != text {
		t.Errorf("chained again it is another:\n%s", cmp.Diff(text, got))
	}

	// A read-only directory is reported. When it is writable again, the plugin is chained.
	const writable = "/run/net.d"
	n.must(t, "mkdir", writable)
	n.must(t, "mount", "--bind", confDir, writable)
	n.must(t, "mount", "--bind", confDir, confDir)
	n.readOnly(t, "kube2iam-agent", "/host"+confDir)
	n.write(t, writable+"/10-pods.conflist", string(original))
	await(t, 30*time.Second, "it is said that nothing can be written", func(ctx context.Context) error {
		said, err := n.output(ctx, nil, "kubectl", "logs", "--namespace=kube-system", "--selector=app.kubernetes.io/name=kube2iam-cni-agent", "--tail=5")
		if err == nil && !strings.Contains(said, "read-only file system") {
			err = errors.New(said)
		}
		return err
	})
	n.must(t, "umount", confDir)
	n.must(t, "umount", writable)
	n.chained(t, podsConfig, "bridge", "portmap")

	n.createPod(t, "idle")
	n.awaitPhase(t, "idle", "Running")
	if role, err := n.ask(t.Context(), t, "idle", rolesPath); err != nil || role != "team-b" {
		t.Errorf("a pod after all that has the role %q, %v", role, err)
	}
}

// readOnly makes a mount read-only in the mount namespace of a program's container.
func (n *node) readOnly(t *testing.T, program, mount string) {
	t.Helper()
	for _, pid := range strings.Fields(n.must(t, "pgrep", "-x", program)) {
		failed := make(chan error)
		go func() {
			runtime.LockOSThread() // the thread changes its namespace and ends with the goroutine
			failed <- func() error {
				namespace, err := os.Open(n.path("/proc/" + pid + "/ns/mnt"))
				if err != nil {
					return err
				}
				defer namespace.Close()
				if err := unix.Unshare(unix.CLONE_FS); err != nil {
					return err
				}
				if err := unix.Setns(int(namespace.Fd()), unix.CLONE_NEWNS); err != nil {
					return err
				}
				return unix.Mount("", mount, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, "")
			}()
		}()
		if err := <-failed; err != nil {
			t.Fatalf("make %s read-only to %s: %v", mount, program, err)
		}
	}
}

// uninstallJob returns the manifest of the Job for this node, with the suite's image.
func uninstallJob(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("../../conf/uninstall/job.yaml")
	if err != nil {
		t.Fatal(err)
	}
	_, text, _ = bytes.Cut(text, []byte("apiVersion")) // skips the comment
	return strings.NewReplacer("NODE", nodeName, "image: kube2iam-cni:unset", "image: localhost/kube2iam-cni:suite\n          imagePullPolicy: Never").Replace("apiVersion" + string(text))
}

// uninstall runs the Job and returns its output.
func (n *node) uninstall(t *testing.T) string {
	t.Helper()
	job, err := n.output(t.Context(), strings.NewReader(uninstallJob(t)), "kubectl", "create", "--filename=-", "--output=name")
	if err != nil {
		t.Fatal(err)
	}
	job = strings.TrimSpace(job)
	await(t, podLimit, "the uninstall done", func(ctx context.Context) error {
		done, err := n.output(ctx, nil, "kubectl", "get", job, "--namespace=kube-system", "--output=jsonpath={.status.succeeded}")
		if err == nil && done != "1" {
			logs, _ := n.output(ctx, nil, "kubectl", "logs", "--namespace=kube-system", job)
			err = fmt.Errorf("succeeded %q: %s", done, logs)
		}
		return err
	})
	said := n.must(t, "kubectl", "logs", "--namespace=kube-system", job)
	n.must(t, "kubectl", "delete", job, "--namespace=kube-system", "--wait")
	return said
}

// testUninstall deletes the DaemonSets and then runs the Job.
func testUninstall(t *testing.T, n *node, c *cloud) {
	n.createPod(t, "idle")
	n.awaitPhase(t, "idle", "Running")
	n.must(t, "kubectl", "delete", "--kustomize="+testdata(t, "overlay"), "--wait")
	await(t, podLimit, "the agent gone", func(ctx context.Context) error {
		left, err := n.output(ctx, nil, "kubectl", "get", "pods", "--namespace=kube-system", "--output=name")
		if err == nil && left != "" {
			err = fmt.Errorf("there are %s", left)
		}
		return err
	})
	if role, err := n.ask(t.Context(), t, "idle", rolesPath); err == nil {
		t.Errorf("with the proxy and the agent gone the pod was answered %q", role)
	}
	if said := n.uninstall(t); !strings.Contains(said, "stays: 1 pods were attached through it") {
		t.Errorf("it said %s", said)
	}

	if diff := cmp.Diff(n.bare, n.ruleset(t)); diff != "" {
		t.Errorf("rules (-before install +after uninstall):\n%s", diff)
	}
	original, err := os.ReadFile(filepath.Join(n.scripts, "pods.conflist"))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := n.configuration(podsConfig); err != nil || got != string(original) {
		t.Errorf("the network configuration: %v\n%s", err, cmp.Diff(string(original), got))
	}
	if networks, err := conflist.Chained(n.path(confDir), pluginType); err != nil || len(networks) > 0 {
		t.Errorf("chained in %q, %v", networks, err)
	}
	if _, err := os.Stat(n.path(stateDir)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the state directory: %v", err)
	}

	// Older pods end and release their addresses, and a new pod starts and ends.
	n.must(t, "kubectl", "delete", "pod", "idle", unprotected, "--ignore-not-found")
	c.metadata.Reset()
	n.createPod(t, "idle")
	n.awaitPhase(t, "idle", "Running")
	if _, err := n.ask(t.Context(), t, "idle", rolesPath); err != nil {
		t.Errorf("the real metadata service: %v", err)
	}
	n.must(t, "kubectl", "delete", "pod", "idle", "--wait")
	if networks, err := conflist.Chained(n.path(confDir), pluginType); err != nil || len(networks) > 0 {
		t.Errorf("chained again in %q, %v", networks, err)
	}
	if said := n.uninstall(t); !strings.Contains(said, "program /opt/cni/programs/kube2iam-cni removed") {
		t.Errorf("a second time it said %s", said)
	}
	if _, err := os.Stat(n.path("/opt/cni/programs/kube2iam-cni")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the program: %v", err)
	}
	if left, err := os.ReadDir(n.path("/var/lib/cni/networks/pods")); err != nil || slices.ContainsFunc(left, func(e os.DirEntry) bool { return strings.HasPrefix(e.Name(), "10.") }) {
		t.Errorf("addresses that were not given back: %v, %v", left, err)
	}
	c.metadata.Reset() // the pod was not guarded
}
