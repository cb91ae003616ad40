//go:build cluster

package cluster

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// enoughProbes is more failures than the kubelet accepts before it restarts the proxy.
const enoughProbes = 4

// testMetricsPortTaken lets a pod take the proxy's metrics port and answer 500. The kubelet's
// probes must still succeed.
func testMetricsPortTaken(t *testing.T, n *node, _ *cloud) {
	before := n.proxyState(t)
	n.createPod(t, "takes-metrics-port")
	n.awaitPhase(t, "takes-metrics-port", "Running")
	// The control: the pod receives requests to the node's port.
	taken := func(ctx context.Context) error {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+nodeIP+":8182/healthz", nil)
		if err != nil {
			return err
		}
		request.Header.Set("User-Agent", "control")
		response, err := n.network().client().Do(request)
		if err != nil {
			return err
		}
		response.Body.Close()
		if response.StatusCode != http.StatusInternalServerError {
			return fmt.Errorf("it answers %s", response.Status)
		}
		return nil
	}
	await(t, podLimit, "the pod answers at the metrics port", taken)
	if said := n.must(t, "kubectl", "logs", "takes-metrics-port"); !strings.Contains(said, `GET "/healthz" "control"`) {
		t.Errorf("the pod has not seen the request: %s", said)
	}
	began := time.Now()
	first := n.probes(t)
	await(t, 5*time.Minute, "the kubelet's probes", func(context.Context) error {
		now := n.probes(t)
		for _, kind := range []string{"Readiness", "Liveness"} {
			if failed := now[kind+" failed"] - first[kind+" failed"]; failed > 0 {
				t.Fatalf("%s probes failed: %d; the pod received %s", kind, failed, n.must(t, "kubectl", "logs", "takes-metrics-port"))
			}
			if done := now[kind+" successful"] - first[kind+" successful"]; done < enoughProbes {
				return fmt.Errorf("%s: %d", kind, done)
			}
		}
		return nil
	})
	t.Logf("%d of each probe in %s", enoughProbes, time.Since(began).Round(time.Second))
	if err := taken(t.Context()); err != nil {
		t.Errorf("the pod no longer answers at the metrics port: %v", err)
	}
	if diff := cmp.Diff(before, n.proxyState(t)); diff != "" {
		t.Errorf("the proxy's pod (-before +after):\n%s", diff)
	}
	if said := n.must(t, "kubectl", "logs", "takes-metrics-port"); strings.Contains(said, "kube-probe") {
		t.Errorf("the kubelet's probes came to the pod: %s", said)
	}
}

// proxyState returns the UID of the proxy's pod, the restarts of its container, and the time since
// which it is ready.
func (n *node) proxyState(t *testing.T) string {
	t.Helper()
	return n.must(t, "kubectl", "get", "pods", "--namespace=kube-system", "--selector=app.kubernetes.io/name=kube2iam-proxy",
		`--output=jsonpath={range .items[*]}{.metadata.uid} restarts {.status.containerStatuses[0].restartCount} ready {.status.conditions[?(@.type=="Ready")].status} since {.status.conditions[?(@.type=="Ready")].lastTransitionTime}{"\n"}{end}`)
}

var probeMetric = regexp.MustCompile(`(?m)^prober_probe_total\{container="proxy",.*probe_type="(\w+)",result="(\w+)"\} (\S+)$`)

// probes returns the kubelet's counters of the proxy's probes, by kind and result.
func (n *node) probes(t *testing.T) map[string]int {
	t.Helper()
	metrics := n.must(t, "kubectl", "get", "--raw", "/api/v1/nodes/"+nodeName+"/proxy/metrics/probes")
	counts := make(map[string]int)
	for _, found := range probeMetric.FindAllStringSubmatch(metrics, -1) {
		value, err := strconv.ParseFloat(found[3], 64)
		if err != nil {
			t.Fatal(errors.Join(err, errors.New(found[0])))
		}
		counts[found[1]+" "+found[2]] += int(value)
	}
	if len(counts) == 0 {
		t.Fatalf("the kubelet counts no probes of the proxy: %s", metrics)
	}
	return counts
}
