//go:build cluster

package cluster

import (
	"fmt"
	"regexp"
	"strconv"
	"testing"
	"time"
)

// starts is how many pods are started, one after the other, to learn how long a sandbox takes.
const starts = 10

// sandboxTime is how long the runtime takes in the mean for a pod's sandbox, its network included, by the kubelet's own account.
func (n *node) sandboxTime(t *testing.T) time.Duration {
	t.Helper()
	sum, count := n.sandboxes(t)
	for range starts {
		n.must(t, "kubectl", "create", "--filename="+testdata(t, "idle.yaml"))
		n.awaitPhase(t, "idle", "Running")
		n.must(t, "kubectl", "delete", "pod", "idle", "--grace-period=1")
	}
	after, done := n.sandboxes(t)
	if done-count != starts {
		t.Fatalf("the kubelet counts %v sandboxes more, want %d", done-count, starts)
	}
	return time.Duration((after - sum) / starts * float64(time.Second))
}

var sandboxMetric = regexp.MustCompile(`(?m)^kubelet_runtime_operations_duration_seconds_(sum|count)\{operation_type="run_podsandbox"\} (\S+)$`)

// sandboxes is how long all sandboxes of this kubelet have taken, in seconds, and how many there were.
func (n *node) sandboxes(t *testing.T) (sum, count float64) {
	t.Helper()
	metrics := n.must(t, "kubectl", "get", "--raw", "/api/v1/nodes/"+nodeName+"/proxy/metrics")
	for _, found := range sandboxMetric.FindAllStringSubmatch(metrics, -1) {
		value, err := strconv.ParseFloat(found[2], 64)
		if err != nil {
			t.Fatal(err)
		}
		if found[1] == "sum" {
			sum = value
		} else {
			count = value
		}
	}
	return sum, count
}

// testStart compares with the time before the plugin was there.
func testStart(t *testing.T, n *node, _ *cloud) {
	with := n.sandboxTime(t)
	t.Logf("a sandbox takes %s, and took %s without the plugin", with.Round(100*time.Microsecond), n.without.Round(100*time.Microsecond))
	fmt.Printf("figure pod_start_overhead_ms %.1f ms\n", float64(with-n.without)/float64(time.Millisecond))
}
