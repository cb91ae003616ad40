package netns

import (
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/kube2iam-cni/kube2iam-cni/test/netnstest"
	"github.com/kube2iam-cni/kube2iam-cni/test/sts"
	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

// eventually waits until done returns true, 30 s at most.
func (n *node) eventually(done func() bool) {
	n.t.Helper()
	deadline := time.After(30 * time.Second)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !done() {
		select {
		case <-tick.C:
		case <-deadline:
			n.t.Fatal("it has not happened after 30 s")
		}
	}
}

// forgetAddresses makes host-local reuse every IP, as after a reboot that lost its files.
func (n *node) forgetAddresses() error {
	return os.RemoveAll(filepath.Join(n.Dir, "ipam", testbed.Network))
}

// TestProxyDown: before the proxy's start, after its crash and after its end, pods are refused
// and nothing reaches the real service.
func TestProxyDown(t *testing.T) {
	onEach(t, func(t *testing.T, n *node) {
		pod, plain := n.run("early", "app"), n.run("plain", "")
		down := func(when string) {
			t.Helper()
			for _, s := range []*testbed.Sandbox{pod, plain} {
				for _, path := range []string{credentials, credentials + testbed.NodeRole, "/latest/meta-data/instance-id"} {
					if got := n.get(s, path); !got.refused() {
						t.Errorf("%s: %s asks for %s: %s, want a refused connection", when, s.Name, path, got)
					}
				}
			}
			if asked := n.IMDS.Requests(); len(asked) != 0 {
				t.Errorf("%s: the real metadata service was asked: %v", when, asked)
			}
		}
		down("before the start")
		p := n.proxy()
		n.wantOwn(pod, "app")
		token := n.request(pod, http.MethodPut, "/latest/api/token", "X-aws-ec2-metadata-token-ttl-seconds", "600")
		n.IMDS.Reset()
		p.Kill()
		down("after a crash")
		p = n.proxy()
		n.wantSession(pod, "app", n.get(pod, credentials+"app", "X-aws-ec2-metadata-token", token.body))
		n.must(p.Stop())
		n.IMDS.Reset()
		down("after it was stopped")
	})
}

// TestAPIServerDown: while the API server is down, a new pod gets an error and known pods are
// served.
func TestAPIServerDown(t *testing.T) {
	onFew(t, func(t *testing.T, n *node) {
		n.proxy(impatient...)
		before := n.run("before", "app")
		n.wantOwn(before, "app")
		n.KubeAPI.Down()
		late := n.pending("late", "other")
		n.must(n.Add(t.Context(), late))
		// Whose address it is the records say; what that pod may have only the API can.
		n.wantStatus(late, credentials, http.StatusInternalServerError)
		n.wantStatus(late, credentials+"app", http.StatusInternalServerError)
		n.wantOwn(before, "app")
		n.must(n.KubeAPI.SetStatus("default", "late", corev1.PodRunning, late.IP.String()))
		n.must(n.KubeAPI.Up())
		// Until the watch is back each request asks the API for the pod. A pod has two such
		// questions a second, and an impatient proxy does not wait for the next one.
		var got answer
		n.eventually(func() bool { got = n.get(late, credentials); return got.status == http.StatusOK })
		if got.body != "other" {
			t.Errorf("late lists its roles: %s, want other", got)
		}
		n.eventually(func() bool { got = n.get(late, credentials+"other"); return got.status == http.StatusOK })
		n.wantSession(late, "other", got)
		n.eventually(func() bool {
			got = n.get(late, credentials+"app")
			return got.status != http.StatusInternalServerError
		})
		if got.status != http.StatusNotFound {
			t.Errorf("late asks for another's role: %s, want 404", got)
		}
	})
}

// TestDirectDial: the proxy closes a connection to its own address without an answer, whatever
// its source.
func TestDirectDial(t *testing.T) {
	onEach(t, func(t *testing.T, n *node) {
		n.proxy()
		pod := n.run("direct", "app")
		n.wantOwn(pod, "app")
		address := testbed.NodeIP.String() + ":8181"
		for who, from := range map[string]*netnstest.Namespace{"a pod": pod.Netns, "a neighbour": n.AWS, "the node": n.Node} {
			// The proxy may be faster with its reset than the dialler with its look at the connection.
			conn, err := from.Dial("tcp", address)
			if errors.Is(err, syscall.ECONNRESET) {
				continue
			}
			if err != nil {
				t.Errorf("%s cannot reach %s: %v", who, address, err)
				continue
			}
			conn.SetDeadline(time.Now().Add(10 * time.Second))
			// The connection may be closed before the request is written.
			io.WriteString(conn, "GET "+credentials+"app HTTP/1.1\r\nHost: "+pod.IP.String()+"\r\nX-Forwarded-For: "+pod.IP.String()+"\r\nForwarded: for="+pod.IP.String()+"\r\n\r\n")
			if got, err := io.ReadAll(conn); len(got) > 0 || err != nil && !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("%s dials %s: %q, %v, want a closed connection", who, address, got, err)
			}
			conn.Close()
		}
		n.wantOwn(pod, "app")
	})
}

// TestGuard: a pod older than the plugin has no redirection. Once the plugin has run on the
// node, it cannot reach the real metadata service.
func TestGuard(t *testing.T) {
	onEach(t, func(t *testing.T, n *node) {
		n.SetChain()
		old := n.run("old", "app")
		if got := n.get(old, credentials); got.status != http.StatusOK || got.body != testbed.NodeRole {
			t.Fatalf("without the plugin: %s, want the node's own role", got)
		}
		n.IMDS.Reset()
		n.SetChain(testbed.Kube2IAM(n.backend))
		n.proxy()
		n.wantOwn(n.run("new", "app"), "app")
		if got := n.get(old, credentials); !got.refused() {
			t.Errorf("with the guard: %s, want a refused connection", got)
		}
		if resp, err := n.Node.HTTP().Get(metadata + "/latest/meta-data/instance-id"); err != nil || resp.StatusCode != http.StatusOK {
			t.Errorf("the node itself: %v, %v, want an answer", resp, err)
		}
	})
}

// TestStoppedProxyAnswersOpenRequests: a proxy that is stopped answers a request that waits for
// STS.
func TestStoppedProxyAnswersOpenRequests(t *testing.T) {
	onFew(t, func(t *testing.T, n *node) {
		p := n.proxy()
		n.STS.SetFault(sts.Fault{Latency: 3 * time.Second})
		pod := n.run("waiting", "app")
		answered := make(chan answer, 1)
		go func() { answered <- n.get(pod, credentials+"app") }()
		n.eventually(func() bool { return strings.Contains(n.metrics(), "kube2iam_iam_cache_misses_total 1\n") })
		n.must(p.Stop())
		n.wantSession(pod, "app", <-answered)
	})
}

// metrics returns the proxy's metrics.
func (n *node) metrics() string {
	n.t.Helper()
	resp, err := n.Node.HTTP().Get("http://127.0.0.1:8182/metrics")
	n.must(err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	n.must(err)
	return string(body)
}

// refusals returns how many requests the proxy has refused.
func (n *node) refusals() int {
	n.t.Helper()
	sum := 0
	for line := range strings.Lines(n.metrics()) {
		if strings.HasPrefix(line, "kube2iam_http_refusals_total{") {
			count, err := strconv.Atoi(strings.Fields(line)[1])
			n.must(err)
			sum += count
		}
	}
	return sum
}

// TestStateDirectoryGone: a pod without a record is refused when the records are lost, also if
// its status reports the address: it may be the former owner's.
func TestStateDirectoryGone(t *testing.T) {
	onFew(t, func(t *testing.T, n *node) {
		n.proxy(impatient...)
		pod := n.run("pod", "app")
		n.wantOwn(pod, "app")
		n.must(os.RemoveAll(n.StateDir))
		n.wantStatus(pod, credentials, http.StatusNotFound)
		n.wantStatus(pod, credentials+"app", http.StatusNotFound)
		n.must(n.AddAgain(t.Context(), pod, pod.Result))
		n.wantOwn(pod, "app")
	})
}

// TestStateDirectoriesDiffer: a proxy whose state directory is not the plugin's warns once a pod
// connects, and never if the two agree.
func TestStateDirectoriesDiffer(t *testing.T) {
	onThese(t, []setup{bridged, routed}, func(t *testing.T, n *node) {
		const warning = "is --state-dir the plugin's stateDir?"
		p := n.proxy()
		if strings.Contains(p.Log(), warning) {
			t.Errorf("on a fresh node: %s", p.Log())
		}
		pod := n.run("pod", "app")
		n.wantOwn(pod, "app")
		if strings.Contains(p.Log(), warning) {
			t.Errorf("of the plugin's own directory: %s", p.Log())
		}
		n.must(p.Stop())

		p = n.proxy("--state-dir", filepath.Join(n.Dir, "other"))
		if strings.Contains(p.Log(), warning) {
			t.Errorf("before a pod connects: %s", p.Log())
		}
		n.wantOwn(pod, "app")
		n.wantOwn(n.run("second", "other"), "other")
		if got := strings.Count(p.Log(), warning); got != 1 {
			t.Errorf("warned %d times: %s", got, p.Log())
		}
	})
}
