//go:build cluster

package cluster

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const (
	churned = 200
	crowd   = 20 // at a time
)

// testChurn starts and deletes pods in batches. Each is served at its first request, and leaves
// nothing behind.
func testChurn(t *testing.T, n *node, _ *cloud) {
	n.awaitNoRecords(t)
	before, sockets, open := n.rules(t), n.sockets(t), n.descriptors(t)
	began := time.Now()
	for number := range churned / crowd {
		pods := n.createBatch(t, 100+number, crowd)
		got := n.outcomes(t, fmt.Sprintf("batch=%d", 100+number), len(pods))
		for _, pod := range pods {
			if first := got[pod.Name]; first.Error != "" || first.Role != pod.Role {
				t.Errorf("%s: its first request: role %q, want %q: %s", pod.Name, first.Role, pod.Role, first.Error)
			}
		}
		n.must(t, "kubectl", "delete", "pod", fmt.Sprintf("--selector=batch=%d", 100+number), "--wait=false")
	}
	n.awaitNoRecords(t)
	t.Logf("%d pods in %s", churned, time.Since(began).Round(time.Second))
	await(t, podLimit, "the rules, the sockets and the descriptors of before", func(context.Context) error {
		if diff := cmp.Diff(before, n.rules(t)); diff != "" {
			return fmt.Errorf("-before +after:\n%s", diff)
		}
		if now := n.sockets(t); now > sockets {
			return fmt.Errorf("the proxy has %d sockets, and had %d", now, sockets)
		}
		// A few descriptors vary: of a network namespace, of an idle connection to STS.
		for program, had := range open {
			if now := n.descriptors(t)[program]; now > had+10 {
				return fmt.Errorf("%s has %d descriptors, and had %d", program, now, had)
			}
		}
		return nil
	})
}

// descriptors returns the number of open files, with sockets, of agent and proxy.
func (n *node) descriptors(t *testing.T) map[string]int {
	t.Helper()
	open := make(map[string]int)
	for _, program := range []string{"kube2iam-agent", "kube2iam-proxy"} {
		open[program] = len(strings.Fields(n.must(t, "sh", "-c", "ls /proc/$(pgrep -o -x "+program+")/fd")))
		if open[program] < 3 {
			t.Errorf("%s has %d descriptors: is it the right process?", program, open[program])
		}
	}
	return open
}

// sockets returns the number of connections to the proxy's port.
func (n *node) sockets(t *testing.T) int {
	t.Helper()
	count := 0
	for line := range strings.Lines(n.must(t, "ss", "--no-header", "--tcp", "--numeric", "sport", "=", ":"+proxyPort)) {
		if strings.TrimSpace(line) != "" {
			count++
		}
	}
	return count
}
