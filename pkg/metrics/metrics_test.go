package metrics

import (
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// scrape returns the sorted lines of the metrics kube2iam_*, without buckets and sums.
func scrape(t *testing.T, m *Metrics) []string {
	t.Helper()
	w := httptest.NewRecorder()
	m.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	if w.Code != 200 {
		t.Fatalf("%d %s", w.Code, w.Body)
	}
	var lines []string
	for line := range strings.SplitSeq(w.Body.String(), "\n") {
		if strings.HasPrefix(line, "kube2iam_") && !strings.Contains(line, "_bucket") && !strings.Contains(line, "_sum") {
			lines = append(lines, line)
		}
	}
	slices.Sort(lines)
	return lines
}

func TestMetrics(t *testing.T) {
	ready := false
	m := New("v1", "abc", "today", func() int { return 3 }, func() bool { return ready })
	m.Requested(true)
	m.Requested(true)
	m.Requested(false)
	m.ConnectionRefused()
	m.RequestDelayed()
	m.Assumed("ok", 100*time.Millisecond)
	m.Assumed("denied", time.Second)
	ready = true
	want := []string{
		`kube2iam_healthcheck_status 1`,
		`kube2iam_http_connections_refused_total 1`,
		`kube2iam_http_requests_delayed_total 1`,
		`kube2iam_iam_cache_hits_total 2`,
		`kube2iam_iam_cache_misses_total 1`,
		`kube2iam_iam_request_duration_seconds_count{code="denied"} 1`,
		`kube2iam_iam_request_duration_seconds_count{code="ok"} 1`,
		`kube2iam_info{build_date="today",commit_hash="abc",version="v1"} 1`,
		`kube2iam_pods 3`,
	}
	if d := cmp.Diff(want, scrape(t, m)); d != "" {
		t.Error(d)
	}
}
