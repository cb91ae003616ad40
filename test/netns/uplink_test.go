package netns

import (
	"net/http"
	"net/netip"
	"testing"
)

// TestUplinkGuardWithoutNetfilter has no rule of netfilter on the node, as after a flush by another
// program, and no agent. A pod that is older than the plugin does not reach the real service; the
// host does.
func TestUplinkGuardWithoutNetfilter(t *testing.T) {
	onFew(t, func(t *testing.T, n *node) {
		n.SetChain()
		pod := n.run("old", "app")
		n.wantStatus(pod, "/latest/meta-data/instance-id", http.StatusOK)
		n.IMDS.Reset()
		n.round()
		n.flushAll()
		if _, err := n.dialService(pod, pod.IP); err == nil {
			t.Error("the pod is connected")
		}
		n.wantOnlyTheNodeAsked()
		n.wantHostAnswered(netip.Addr{}, metadata)
	})
}
