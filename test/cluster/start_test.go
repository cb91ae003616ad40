//go:build cluster

package cluster

import (
	"context"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// startPairs is the number of pods that start with the plugin, and of pods that start without.
const startPairs = 40

// testStart starts pods alternately with and without the plugin. The overhead is the median of the
// paired differences, and its spread is their interquartile range.
func testStart(t *testing.T, n *node, _ *cloud) {
	n.must(t, "kubectl", "apply", "--filename="+testdata(t, "unchained.yaml"))
	t.Cleanup(func() {
		if _, err := n.output(context.WithoutCancel(t.Context()), nil, "kubectl", "delete", "runtimeclass", "unchained"); err != nil {
			t.Error(err)
		}
	})
	var pods []string
	start := func(pair int, class string) float64 {
		name := fmt.Sprintf("start-%d%s", pair+1, class)
		pods = append(pods, name)
		return n.sandboxMilliseconds(t, name, class)
	}
	start(-1, "unchained") // makes the bridge of that network
	start(-1, "")
	var overheads []float64
	for pair := range startPairs {
		var with, without float64
		if pair%2 == 0 {
			with, without = start(pair, ""), start(pair, "unchained")
		} else {
			without, with = start(pair, "unchained"), start(pair, "")
		}
		overheads = append(overheads, with-without)
	}
	n.must(t, append([]string{"kubectl", "delete", "pod", "--grace-period=1"}, pods...)...)
	slices.Sort(overheads)
	fmt.Printf("figure pod_start_overhead_ms %.1f ms\n", overheads[startPairs/2])
	fmt.Printf("figure pod_start_overhead_spread_ms %.1f ms\n", overheads[startPairs*3/4]-overheads[startPairs/4])
}

// sandboxMilliseconds starts a pod of a runtime class and returns how long the runtime takes for
// its sandbox, its network included, by the kubelet's own measurement.
func (n *node) sandboxMilliseconds(t *testing.T, name, class string) float64 {
	t.Helper()
	text, err := os.ReadFile(testdata(t, "idle.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	manifest := strings.ReplaceAll(string(text), "name: idle", "name: "+name)
	if class != "" {
		manifest = strings.Replace(manifest, "spec:", "spec:\n  runtimeClassName: "+class, 1)
	}
	before, started := n.sandboxes(t)
	if _, err := n.output(t.Context(), strings.NewReader(manifest), "kubectl", "create", "--filename=-"); err != nil {
		t.Fatal(err)
	}
	n.awaitPhase(t, name, "Running")
	after, done := n.sandboxes(t)
	if diff := cmp.Diff(started+1, done); diff != "" {
		t.Fatalf("sandboxes that the kubelet has started (-want +got):\n%s", diff)
	}
	return 1000 * (after - before)
}

var sandboxMetric = regexp.MustCompile(`(?m)^kubelet_runtime_operations_duration_seconds_(sum|count)\{operation_type="run_podsandbox"\} (\S+)$`)

// sandboxes returns how long all sandboxes of this kubelet have taken, in seconds, and how many
// there were.
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
