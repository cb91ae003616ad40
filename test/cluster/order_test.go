//go:build cluster

package cluster

import (
	"bytes"
	"encoding/json"
	"testing"
)

// testOrder installs one DaemonSet and then the other, in both orders. A pod that starts in between
// gets no answer.
func testOrder(t *testing.T, n *node, _ *cloud) {
	all := objects(t, n.must(t, "kubectl", "kustomize", testdata(t, "overlay")))
	apply := func(name string) {
		t.Helper()
		text, err := json.Marshal(all["DaemonSet "+name])
		if err != nil {
			t.Fatal(err)
		}
		if _, err := n.output(t.Context(), bytes.NewReader(text), "kubectl", "apply", "--filename=-"); err != nil {
			t.Fatal(err)
		}
		n.must(t, "kubectl", "rollout", "status", "daemonset/"+name, "--namespace=kube-system", "--timeout=110s")
	}
	for _, order := range [][]string{{"kube2iam-cni-agent", "kube2iam-proxy"}, {"kube2iam-proxy", "kube2iam-cni-agent"}} {
		n.must(t, append([]string{"kubectl", "delete", "daemonset", "--namespace=kube-system", "--cascade=foreground", "--wait"}, daemonSets...)...)
		apply(order[0])
		n.must(t, "kubectl", "create", "--filename="+testdata(t, "idle.yaml"))
		n.awaitPhase(t, "idle", "Running")
		if role, err := n.ask(t.Context(), t, "idle", rolesPath); err == nil && role != "team-b" {
			t.Errorf("with %s alone the pod has the role %q", order[0], role)
		}
		apply(order[1])
		if role, err := n.ask(t.Context(), t, "idle", rolesPath); err != nil || role != "team-b" {
			t.Errorf("%q: the pod has the role %q, %v", order, role, err)
		}
		n.must(t, "kubectl", "delete", "pod", "idle", "--grace-period=1", "--wait")
	}
}
