package netns

import (
	"net/http"
	"strings"
	"testing"

	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

// TestNodeRuleOfKube2iam: the proxy works without the plugin, as kube2iam's manifests run it:
// one rule for the node, and pods resolved by their status.
func TestNodeRuleOfKube2iam(t *testing.T) {
	onThese(t, []setup{{primary: "bridge", backend: iptables}, {primary: "ptp", backend: iptables}}, func(t *testing.T, n *node) {
		n.SetChain()
		pod, plain := n.run("pod", "app"), n.run("plain", "")
		hostInterface := map[string]string{"bridge": "cni0", "ptp": "veth+"}[n.primary]
		flags := append([]string{"--iptables", "--host-ip", testbed.NodeIP.String(), "--host-interface", hostInterface}, impatient...)
		p := n.proxy(flags...)
		n.wantOwn(pod, "app")
		n.wantStatus(plain, credentials, http.StatusNotFound)
		n.wantStatus(plain, credentials+"app", http.StatusNotFound)
		if !strings.Contains(p.Log(), "needless") {
			t.Error("the log does not say that the plugin makes the rule needless")
		}
		// A second start adds no second rule.
		n.must(p.Stop())
		n.proxy(flags...)
		n.wantOwn(pod, "app")
		if rules := n.rules(); strings.Count(rules, "-j DNAT") != 1 {
			t.Errorf("not one rule:\n%s", rules)
		}
	})
}
