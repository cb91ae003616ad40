package netns

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/kube2iam-cni/kube2iam-cni/test/kubeapi"
	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

// served is how long each answer took.
type served []time.Duration

func (s served) String() string {
	if len(s) == 0 {
		return "never"
	}
	sorted := slices.Sorted(slices.Values(s))
	return fmt.Sprintf("%d times, in %v in the median, %v at the 99th percentile and %v at most", len(s), sorted[len(s)/2], sorted[len(s)*99/100], sorted[len(s)-1])
}

// servedAtOnce requests a pod's credentials until stop and returns how long each answer took.
// Each must come within a few of an SDK's tries, also on a busy machine.
func (n *node) servedAtOnce(s *testbed.Sandbox, role string, stop <-chan struct{}) (times served) {
	for {
		select {
		case <-stop:
			return times
		default:
		}
		began := time.Now()
		if got := n.requestWithin(5*time.Second, s, http.MethodGet, credentials+role); got.status != http.StatusOK {
			n.t.Errorf("%s, while its neighbour is busy: %s", s.Name, got)
			return times
		}
		times = append(times, time.Since(began))
	}
}

// TestOnePodCannotStarveItsNeighbour: a pod opens ten thousand connections, holds silent ones,
// requests other metadata, cheap answers and lookups at the API server, and changes its session
// 50 times a second. Its neighbour is served meanwhile, and so is the pod afterwards.
func TestOnePodCannotStarveItsNeighbour(t *testing.T) {
	onThese(t, []setup{bridged}, func(t *testing.T, n *node) {
		n.proxy(impatient...)
		greedy, neighbour := n.run("greedy", "app"), n.run("neighbour", "other")
		n.wantOwn(greedy, "app")
		n.wantOwn(neighbour, "other")
		for name, attack := range map[string]func(){
			"ten thousand connections": func() { n.dialMany(greedy, 10_000) },
			"silent connections":       func() { n.dialMany(greedy, 500) },
			"other metadata": func() {
				var asking sync.WaitGroup
				for range 16 {
					asking.Go(func() {
						for range 100 {
							n.get(greedy, "/latest/meta-data/local-ipv4")
						}
					})
				}
				asking.Wait()
			},
			"cheap requests": func() {
				began := time.Now()
				n.asksOften(greedy, 8, 300)
				// 1000 are free, and 200 a second.
				if took := time.Since(began); took < 6*time.Second {
					t.Errorf("2400 requests were answered within %v", took)
				}
				if !strings.Contains(n.metrics(), "kube2iam_http_requests_delayed_total") || strings.Contains(n.metrics(), "kube2iam_http_requests_delayed_total 0\n") {
					t.Error("no metric tells of requests that waited")
				}
			},
			"questions for the API server": func() { n.askForDeleted("deleted") },
			"changes of its session":       func() { n.changeOften(greedy, "app", "other") },
		} {
			stop, times := make(chan struct{}), served(nil)
			var neighbours sync.WaitGroup
			neighbours.Go(func() { times = n.servedAtOnce(neighbour, "other", stop) })
			attack()
			close(stop)
			neighbours.Wait()
			if len(times) == 0 {
				t.Errorf("%s: the neighbour was never served", name)
			}
			t.Logf("%s: the neighbour was served %v", name, times)
		}
		if asked := len(n.IMDS.Requests()); asked > 400 {
			t.Errorf("the real metadata service was asked %d times", asked)
		}
		n.eventually(func() bool { return n.getSoon(greedy, credentials+"app").status == http.StatusOK })
	})
}

// askForDeleted makes requests that need a lookup from a pod that the API server no longer has.
func (n *node) askForDeleted(name string) {
	n.t.Helper()
	s := n.run(name, "app")
	n.must(n.KubeAPI.DeletePod("default", name))
	n.eventually(func() bool { return n.getSoon(s, credentials).status == http.StatusNotFound })
	gets := func() int { return n.KubeAPI.Requests()[kubeapi.Request{Verb: "get", Resource: "pods"}] }
	before, began := gets(), time.Now()
	var asking sync.WaitGroup
	for range 16 {
		asking.Go(func() {
			for range 20 {
				n.get(s, credentials)
			}
		})
	}
	asking.Wait()
	most := 4 + 2*time.Since(began).Seconds() + 1
	if asked := gets() - before; asked == 0 || float64(asked) > most {
		n.t.Errorf("the API server was asked %d times, want 1 to %.0f", asked, most)
	}
}

// changeOften changes a pod's session 50 times a second. A client requests its credentials after
// each change and hangs up. After ten seconds new pods start and change their session faster
// than it is prefetched. The last change must reach STS at once.
func (n *node) changeOften(s *testbed.Sandbox, role, newRole string) {
	n.t.Helper()
	stop, begun := make(chan struct{}), make(chan struct{})
	var changing sync.WaitGroup
	defer changing.Wait()
	defer close(stop)
	changing.Go(func() {
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			case <-tick.C:
			}
			n.changeSession(s, fmt.Sprint("session-", i))
			changing.Go(func() { n.requestWithin(100*time.Millisecond, s, http.MethodGet, credentials+role) })
			if i == 500 {
				close(begun)
			}
		}
	})
	select {
	case <-begun:
	case <-time.After(time.Minute):
		n.t.Error("the pod did not change 500 times within a minute")
		return
	}
	for i := range 3 {
		pod := n.run(fmt.Sprint("new-", i), newRole)
		for _, session := range []string{"first", "second", "last"} {
			n.changeSession(pod, session)
		}
		began := time.Now()
		for session := ""; session != "last"; { // the proxy may not know of the changes yet
			got := n.requestWithin(5*time.Second, pod, http.MethodGet, credentials+newRole)
			var doc struct{ AccessKeyID string }
			if err := json.Unmarshal([]byte(got.body), &doc); got.status != http.StatusOK || err != nil || time.Since(began) > 5*time.Second {
				n.t.Errorf("%s, while its neighbour changes its session, after %v: %d, %v", pod.Name, time.Since(began), got.status, got.err)
				return
			}
			session = n.issued(doc.AccessKeyID).SessionName
		}
		n.t.Logf("%s was served after %v", pod.Name, time.Since(began))
	}
}

func (n *node) changeSession(s *testbed.Sandbox, session string) {
	n.t.Helper()
	err := n.KubeAPI.UpdatePod(s.Namespace, s.Name, func(p *corev1.Pod) { p.Annotations["iam.amazonaws.com/session-name"] = session })
	if err != nil {
		n.t.Error(err)
	}
}

// dialMany opens silent connections to the service, a hundred at a time, and holds them until
// all were opened or refused.
func (n *node) dialMany(s *testbed.Sandbox, connections int) {
	n.t.Helper()
	var left atomic.Int64
	left.Store(int64(connections))
	var mu sync.Mutex
	var open []net.Conn
	var dialling sync.WaitGroup
	for range 100 {
		dialling.Go(func() {
			for left.Add(-1) >= 0 {
				c, err := s.Netns.Dial("tcp", testbed.MetadataAddr)
				if err != nil {
					continue
				}
				io.WriteString(c, "GET / HTTP/1.1\r\nX-Slow: ")
				mu.Lock()
				open = append(open, c)
				mu.Unlock()
			}
		})
	}
	dialling.Wait()
	for _, c := range open {
		c.Close()
	}
}
