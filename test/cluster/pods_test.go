//go:build cluster

package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// podLimit is the time in which a pod starts, finishes or is deleted on a busy machine.
const podLimit = 2 * time.Minute

// testdata returns the absolute path of a manifest.
func testdata(t *testing.T, name string) string {
	t.Helper()
	path, err := filepath.Abs(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// createPod creates the pod of testdata/<name>.yaml, and deletes it at the end of the test.
func (n *node) createPod(t *testing.T, name string) {
	t.Helper()
	n.must(t, "kubectl", "apply", "--filename="+testdata(t, name+".yaml"))
	t.Cleanup(func() {
		ctx := context.WithoutCancel(t.Context()) // t.Context() is already cancelled
		if _, err := n.output(ctx, nil, "kubectl", "delete", "pod", name, "--ignore-not-found"); err != nil {
			t.Error(err)
		}
	})
}

// awaitPhase waits until a pod is in one of the phases, and returns the phase.
func (n *node) awaitPhase(t *testing.T, pod string, phases ...string) (phase string) {
	t.Helper()
	await(t, podLimit, "pod "+pod+" "+strings.Join(phases, " or "), func(ctx context.Context) error {
		var err error
		phase, err = n.output(ctx, nil, "kubectl", "get", "pod", pod, "--output=jsonpath={.status.phase}")
		if err != nil {
			return err
		}
		if !slices.Contains(phases, phase) {
			return fmt.Errorf("it is %s", phase)
		}
		return nil
	})
	return phase
}

// podNetwork returns the node's path of a running pod's network namespace.
func (n *node) podNetwork(t *testing.T, pod string) string {
	t.Helper()
	ids := strings.Fields(n.must(t, "ctr", "--namespace=k8s.io", "containers", "list", "--quiet",
		fmt.Sprintf("labels.%q==%s", "io.kubernetes.pod.name", pod)))
	for line := range strings.Lines(n.must(t, "ctr", "--namespace=k8s.io", "tasks", "list")) {
		fields := strings.Fields(line) // TASK PID STATUS
		if len(fields) == 3 && slices.Contains(ids, fields[0]) && fields[2] == "RUNNING" {
			return "/proc/" + fields[1] + "/ns/net"
		}
	}
	t.Fatalf("no task runs for pod %s, whose containers are %q", pod, ids)
	return ""
}

// outcome is the output of the image firstrequest: the result of its first request.
type outcome struct {
	Role         string
	AccessKeyID  string
	Error        string
	Milliseconds int
}

// outcomes waits for the first requests of n pods with a label, and returns the results by pod.
func (n *node) outcomes(t *testing.T, label string, pods int) map[string]outcome {
	t.Helper()
	var found map[string]outcome
	await(t, podLimit, fmt.Sprintf("first requests of %d pods with %s", pods, label), func(ctx context.Context) error {
		logs, err := n.output(ctx, nil, "kubectl", "logs", "--selector="+label, "--prefix", "--tail=-1")
		if err != nil {
			return err
		}
		found, err = parseOutcomes(logs)
		if err != nil {
			return err
		}
		if len(found) != pods {
			return fmt.Errorf("%d have asked", len(found))
		}
		return nil
	})
	return found
}

// parseOutcomes reads lines as "[pod/<pod>/<container>] <JSON>".
func parseOutcomes(logs string) (map[string]outcome, error) {
	found := make(map[string]outcome)
	for line := range strings.Lines(logs) {
		prefix, text, ok := strings.Cut(line, "] ")
		parts := strings.Split(prefix, "/")
		if !ok || len(parts) != 3 {
			return nil, fmt.Errorf("line %q has no [pod/<pod>/<container>]", line)
		}
		var o outcome
		if err := json.Unmarshal([]byte(text), &o); err != nil {
			return nil, fmt.Errorf("line %q: %w", line, err)
		}
		found[parts[1]] = o
	}
	return found, nil
}
