//go:build cluster

package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// These are as in node/settings.sh.
const (
	nodeName   = "ip-10-0-12-34.eu-central-1.compute.internal"
	nodeIP     = "192.168.250.10"
	outsideIP  = "192.168.250.1"
	metadataIP = "169.254.169.254"
)

// node is the Kubernetes node that the scripts in node/ make.
type node struct {
	scripts string     // their directory
	state   string     // the directory of binaries, keys and logs
	pid     string     // of the node's first process, on the machine
	bare    string     // all rules before the installation
	suite   *testing.T // its cleanup ends what lives as long as the node
	boots   int
}

// startNode starts the node that scripts/test-cluster.sh has built. The script stops it, however
// the test ends.
func startNode(t *testing.T) *node {
	t.Helper()
	scripts, err := filepath.Abs("node")
	if err != nil {
		t.Fatal(err)
	}
	n := &node{scripts: scripts, state: os.Getenv("KUBE2IAM_CNI_CLUSTER_STATE"), suite: t}
	if n.state == "" {
		t.Fatal("KUBE2IAM_CNI_CLUSTER_STATE is not set: run scripts/test-cluster.sh")
	}
	t.Cleanup(func() {
		if t.Failed() {
			n.tellLogs(t)
		}
	})
	n.start(t)
	return n
}

func (n *node) start(t *testing.T) {
	t.Helper()
	if err := n.startScript(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.started(t)
}

func (n *node) startScript(ctx context.Context) error {
	start := exec.CommandContext(ctx, filepath.Join(n.scripts, "start.sh"))
	start.Stdout, start.Stderr = os.Stdout, os.Stderr
	if err := start.Run(); err != nil {
		return fmt.Errorf("start the node: %w", err)
	}
	return nil
}

func (n *node) started(t *testing.T) {
	t.Helper()
	pid, err := os.ReadFile(filepath.Join(n.state, "init.pid"))
	if err != nil {
		t.Fatal(err)
	}
	n.pid = strings.TrimSpace(string(pid))
	n.boots++
}

// reboot kills all processes of the node together. Network, rules and /run are lost, the disk
// stays. It calls meanwhile before the kubelet starts again.
func (n *node) reboot(t *testing.T, meanwhile func()) {
	t.Helper()
	n.boots++ // the daemons end on purpose
	pid, err := strconv.Atoi(n.pid)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	await(t, 30*time.Second, "the node down", func(context.Context) error {
		if _, err := os.Stat(filepath.Join("/proc", n.pid)); !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("its first process is there: %v", err)
		}
		return nil
	})
	hold := filepath.Join(n.state, "hold")
	if err := errors.Join(os.Remove(filepath.Join(n.state, "init.pid")), os.WriteFile(hold, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(hold)
	started := make(chan error, 1)
	go func() { started <- n.startScript(t.Context()) }()
	await(t, 60*time.Second, "the node's containerd", func(ctx context.Context) error {
		if _, err := os.Stat(filepath.Join(n.state, "init.pid")); err != nil {
			return err
		}
		n.started(t)
		_, err := n.output(ctx, nil, "kubectl", "get", "--raw", "/readyz")
		return err
	})
	meanwhile()
	if err := os.Remove(hold); err != nil {
		t.Fatal(err)
	}
	if err := <-started; err != nil {
		t.Fatal(err)
	}
}

// path returns the machine's path of a file of the node.
func (n *node) path(name string) string { return filepath.Join("/proc", n.pid, "root", name) }

// command returns a command in the node's namespaces. kubectl's user is the administrator.
func (n *node) command(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, filepath.Join(n.scripts, "in"), args...)
}

// output returns the standard output of a command in the node. The error has its standard error. A
// command is killed after podLimit: kubectl may wait forever.
func (n *node) output(ctx context.Context, stdin io.Reader, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, podLimit)
	defer cancel()
	c := n.command(ctx, args...)
	var stdout, stderr bytes.Buffer
	c.Stdin, c.Stdout, c.Stderr = stdin, &stdout, &stderr
	// At the limit, nsenter is killed. The command in the node keeps the pipes open.
	c.WaitDelay = time.Second
	if err := c.Run(); err != nil {
		return stdout.String(), fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return stdout.String(), nil
}

// must returns the output of a command that must succeed.
func (n *node) must(t *testing.T, args ...string) string {
	t.Helper()
	out, err := n.output(t.Context(), nil, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// daemon starts a command that runs until the node is stopped. Its log is with those of the node's
// daemons.
func (n *node) daemon(t *testing.T, name string, args ...string) {
	t.Helper()
	log, err := os.Create(n.log(name))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	c := n.command(context.WithoutCancel(t.Context()), args...)
	c.Stdout, c.Stderr = log, log
	if err := c.Start(); err != nil {
		t.Fatalf("start %s: %v", name, err)
	}
	// Stopping the node kills the process. Wait reaps the nsenter process.
	exited := make(chan error, 1)
	go func() { exited <- c.Wait() }()
	boot := n.boots
	n.suite.Cleanup(func() {
		select {
		case err := <-exited:
			if n.boots == boot {
				n.suite.Errorf("%s ended before the test: %v", name, err)
			}
		default:
		}
	})
}

func (n *node) log(name string) string { return filepath.Join(n.state, "log", name+".log") }

// tellLogs prints the end of every daemon's log, because the node is removed after a failure.
func (n *node) tellLogs(t *testing.T) {
	for _, args := range [][]string{
		{"get", "pods", "--all-namespaces", "--output=wide"}, {"describe", "pods", "--namespace=kube-system"},
		{"logs", "--namespace=kube-system", "--selector=app.kubernetes.io/name in (kube2iam-cni-agent, kube2iam-proxy)", "--tail=40", "--prefix"},
	} {
		out, err := n.output(context.WithoutCancel(t.Context()), nil, append([]string{"kubectl"}, args...)...)
		t.Logf("kubectl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	files, err := filepath.Glob(n.log("*"))
	if err != nil {
		t.Error(err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Error(err)
			continue
		}
		lines := strings.Split(strings.TrimSpace(string(text)), "\n")
		t.Logf("the end of %s:\n%s", filepath.Base(file), strings.Join(lines[max(0, len(lines)-15):], "\n"))
	}
}

// await polls until holds returns nil, and fails the test with its last error at the limit.
func await(t *testing.T, limit time.Duration, what string, holds func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	look := time.NewTicker(200 * time.Millisecond)
	defer look.Stop()
	var reason error
	for {
		err := holds(ctx)
		if err == nil {
			return
		}
		if ctx.Err() == nil { // otherwise err is that of the limit
			reason = err
		}
		select {
		case <-ctx.Done():
			t.Fatalf("%s: not within %s: %v", what, limit, reason)
		case <-look.C:
		}
	}
}
