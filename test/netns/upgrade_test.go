package netns

import (
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/kube2iam-cni/kube2iam-cni/test/imdsclient"
	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

// successor starts another proxy and waits until it has taken over.
func (n *node) successor(flags ...string) *testbed.Process {
	n.t.Helper()
	p, err := n.LaunchProxy(flags...)
	n.must(err)
	n.t.Cleanup(func() {
		if n.t.Failed() {
			n.t.Logf("a successor's log:\n%s", p.Log())
		}
	})
	n.eventually(func() bool {
		if err := p.Ended(); err != nil {
			n.t.Fatal(err)
		}
		return strings.Contains(p.Log(), "took over from the proxy")
	})
	return p
}

// TestUpgradesLoseNoRequest has proxies take each other's place under load. STS is away from the
// second on.
func TestUpgradesLoseNoRequest(t *testing.T) {
	onThese(t, []setup{bridged, routedIPTables}, func(t *testing.T, n *node) {
		now := n.proxy(impatient...)
		pods := []*testbed.Sandbox{n.run("a", "app"), n.run("b", "other")}
		for i, role := range []string{"app", "other"} {
			n.wantOwn(pods[i], role)
		}
		rules, calls := n.rules(), len(n.STS.Calls())
		stop := make(chan struct{})
		var clients sync.WaitGroup
		var asked, failed atomic.Int64
		for i, pod := range pods {
			role := []string{"app", "other"}[i]
			for _, keep := range []bool{true, false} {
				clients.Go(func() {
					c := &imdsclient.Client{Keep: keep, Dial: func() (net.Conn, error) { return pod.Netns.Dial("tcp", testbed.MetadataAddr) }}
					defer c.Close()
					for {
						select {
						case <-stop:
							return
						default:
						}
						if body, err := c.Get(credentials + role); err != nil || !strings.Contains(body, `"Success"`) {
							failed.Add(1)
							t.Errorf("%s, keeping its connections %v, request %d: %q, %v", pod.Name, keep, asked.Load(), body, err)
							return
						}
						asked.Add(1)
					}
				})
			}
		}
		n.STS.Down()
		askMore := func() {
			more := asked.Load() + 500
			n.eventually(func() bool { return asked.Load() >= more || failed.Load() > 0 })
		}
		for range 5 {
			next := n.successor(impatient...)
			askMore()
			n.must(now.Stop())
			askMore()
			now = next
		}
		close(stop)
		clients.Wait()
		t.Logf("%d requests, %d failed", asked.Load(), failed.Load())
		if after := n.rules(); after != rules {
			t.Errorf("the rules changed:\n%s\nwas:\n%s", after, rules)
		}
		if more := len(n.STS.Calls()) - calls; more != 0 {
			t.Errorf("STS was asked %d times for what the first proxy had", more)
		}
	})
}

// TestProxyGoesOnWhenItsSuccessorDies kills the successor, once before and once after it has taken
// over.
func TestProxyGoesOnWhenItsSuccessorDies(t *testing.T) {
	onThese(t, []setup{bridged}, func(t *testing.T, n *node) {
		n.proxy(impatient...)
		pod := n.run("a", "app")
		n.wantOwn(pod, "app")
		early, err := n.LaunchProxy(impatient...)
		n.must(err)
		early.Kill()
		n.wantOwn(pod, "app")
		n.successor(impatient...).Kill()
		n.wantOwn(pod, "app")
		n.successor(impatient...)
		n.wantOwn(pod, "app")
	})
}

// TestSuccessorServesWhenItsPredecessorIsKilled has nobody hand anything over.
func TestSuccessorServesWhenItsPredecessorIsKilled(t *testing.T) {
	onThese(t, []setup{bridged}, func(t *testing.T, n *node) {
		old := n.proxy(impatient...)
		pod := n.run("a", "app")
		n.wantOwn(pod, "app")
		n.KubeAPI.Down() // so that the successor is not ready yet
		next, err := n.LaunchProxy(impatient...)
		n.must(err)
		n.eventually(func() bool { return strings.Contains(next.Log(), "another proxy serves; taking over") })
		n.wantOwn(pod, "app")
		old.Kill()
		n.must(n.KubeAPI.Up())
		n.eventually(func() bool { return n.Healthy(t.Context()) == nil })
		n.wantOwn(pod, "app")
	})
}
