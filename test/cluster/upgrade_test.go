//go:build cluster

package cluster

import (
	"context"
	"fmt"
	"net"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kube2iam-cni/kube2iam-cni/test/imdsclient"
)

const (
	rolesPath = "/latest/meta-data/iam/security-credentials/"
	upgrades  = 10
	// enough is how many requests the upgrades are to see.
	enough = 20000
)

// imdsClient asks from a pod's network.
func (n *node) imdsClient(t *testing.T, pod string, keep bool) *imdsclient.Client {
	t.Helper()
	from := network(n.path(n.podNetwork(t, pod)))
	return &imdsclient.Client{Keep: keep, Dial: func() (net.Conn, error) {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		return from.dial(ctx, "tcp", metadataIP+":80")
	}}
}

// ask makes one request from a pod's network.
func (n *node) ask(_ context.Context, t *testing.T, pod, path string) (string, error) {
	t.Helper()
	a := n.imdsClient(t, pod, false)
	defer a.Close()
	return a.Get(path)
}

// metricsChanges are the flags that change the metrics address, by the number of the upgrade.
var metricsChanges = map[int]string{
	upgrades / 2:   "--metrics-port=8282",
	upgrades/2 + 2: "--metrics-address=127.0.0.1",
}

// testUpgrades rolls out both DaemonSets several times, under load.
func testUpgrades(t *testing.T, n *node, c *cloud) {
	n.createPod(t, "idle")
	n.awaitPhase(t, "idle", "Running")
	before := n.rules(t)
	c.metadata.Reset()
	stop := make(chan struct{})
	var clients sync.WaitGroup
	var asked, failed atomic.Int64
	for _, keep := range []bool{true, true, false, false} {
		a := n.imdsClient(t, "idle", keep)
		clients.Go(func() {
			defer a.Close()
			for {
				select {
				case <-stop:
					return
				case <-time.After(2 * time.Millisecond): // leaves time for other processes
				}
				asked.Add(1)
				if body, err := a.Get(rolesPath + "team-b"); err != nil || !strings.Contains(body, `"Success"`) {
					failed.Add(1)
					t.Errorf("request %d, keeping connections %v: %q, %v", asked.Load(), keep, body, err)
					a.Close()
				}
			}
		})
	}
	// The rules must not change at any time.
	looks := 0
	clients.Go(func() {
		for ; ; looks++ {
			select {
			case <-stop:
				return
			case <-time.After(100 * time.Millisecond):
			}
			if diff := cmp.Diff(before, n.rules(t)); diff != "" {
				t.Errorf("for a moment the rules were others:\n%s", diff)
				return
			}
		}
	})
	began := time.Now()
	for i := range upgrades {
		// For Kubernetes, this is another version.
		n.must(t, "kubectl", "set", "env", "daemonset", "--all", "--namespace=kube-system", fmt.Sprint("UPGRADE=", i))
		if flag := metricsChanges[i]; flag != "" {
			n.must(t, "kubectl", "patch", "daemonset", "kube2iam-proxy", "--namespace=kube-system", "--type=json",
				`--patch=[{"op": "add", "path": "/spec/template/spec/containers/0/args/-", "value": "`+flag+`"}]`)
		}
		n.rolledOut(t)
		if diff := cmp.Diff(before, n.rules(t)); diff != "" {
			t.Errorf("the rules changed:\n%s", diff)
		}
	}
	took := time.Since(began)
	for asked.Load() < enough && failed.Load() == 0 {
		time.Sleep(10 * time.Millisecond)
	}
	close(stop)
	clients.Wait()
	if err := ok(t.Context(), n.network().client(), "http://127.0.0.1:8282/healthz"); err != nil {
		t.Errorf("metrics at their new address: %v", err)
	}
	if err := ok(t.Context(), n.network().client(), "http://"+nodeIP+":8282/healthz"); err == nil {
		t.Error("metrics are served at the node's address as well")
	}
	if looks < 2*upgrades {
		t.Errorf("the rules were looked at %d times", looks)
	}
	t.Logf("%d upgrades in %s: %d requests, %d failed", upgrades, took.Round(time.Second), asked.Load(), failed.Load())
	fmt.Printf("figure upgrade_failed_requests %d requests\n", failed.Load())
}

// testCrash kills the proxy's process, as the kernel's OOM killer does.
func testCrash(t *testing.T, n *node, _ *cloud) {
	n.createPod(t, "idle")
	n.awaitPhase(t, "idle", "Running")
	a := n.imdsClient(t, "idle", false)
	if _, err := a.Get(rolesPath + "team-b"); err != nil {
		t.Fatal(err)
	}
	killed := exec.CommandContext(t.Context(), "nsenter", "--target="+n.pid, "--pid", "--mount", "pkill", "-KILL", "-x", "kube2iam-proxy")
	if out, err := killed.CombinedOutput(); err != nil {
		t.Fatalf("kill the proxy: %v: %s", err, out)
	}
	began := time.Now()
	// Repeated requests for credentials, which the new proxy must fetch.
	refused := 0
	for {
		_, err := a.Get(rolesPath + "team-b")
		if err == nil && refused > 0 {
			break
		}
		if a.Close(); err != nil {
			refused++
		}
		if time.Since(began) > podLimit {
			t.Fatalf("refused %d times in %s, the last time with %v", refused, podLimit, err)
		}
		time.Sleep(5 * time.Millisecond)
	}
	gap := time.Since(began)
	t.Logf("served again %s after the proxy was killed", gap.Round(time.Millisecond))
	fmt.Printf("figure proxy_crash_gap_ms %d ms\n", gap.Milliseconds())
	n.rolledOut(t)
}
