package agent

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// TestCollectionDestroysSockets has the agent collect an attachment, of which one address has
// another holder.
func TestCollectionDestroysSockets(t *testing.T) {
	b := newBed(t, "nftables")
	b.attached(b.pod("c1", 7, "10.1.0.5", "fd00:1::5"))
	b.attached(b.pod("c2", 8, "10.1.0.6"))
	b.Must(unix.Unlink(filepath.Join(b.node.StateDir, "by-ip", "10.1.0.5")))
	b.Must(unix.Link(filepath.Join(b.node.StateDir, "attachments", "c2@eth0.json"), filepath.Join(b.node.StateDir, "by-ip", "10.1.0.5")))
	delete(b.links, 7)
	b.Destroyed = nil
	b.round()
	b.WantDestroyed("collection", "[8181] [fd00:1::5] [c1@eth0 c2@eth0]")
}

// TestRunningPodsKeepTheirSockets adopts a pod: none of its sockets is destroyed.
func TestRunningPodsKeepTheirSockets(t *testing.T) {
	b := newBed(t, "nftables")
	b.pod("c1", 7, "10.1.0.5")
	b.cached("c1", cacheEntryOf("c1", "/netns/c1", result("1.1.0", "10.1.0.5")))
	b.round()
	if got := b.Recorded(); len(got) != 1 {
		t.Fatalf("records: %v", got)
	}
	b.WantDestroyed("adoption")
}

// TestRunningPodsKeepTheirSocketsAfterAFailure adopts a pod whose rules cannot be made. Each round
// tries again, so connections that were reset would be reset in every round.
func TestRunningPodsKeepTheirSocketsAfterAFailure(t *testing.T) {
	b := newBed(t, "nftables")
	b.pod("c1", 7, "10.1.0.5")
	b.cached("c1", cacheEntryOf("c1", "/netns/c1", result("1.1.0", "10.1.0.5")))
	b.round()
	whole := b.AllRules()
	r, err := b.node.Records.Get("c1", "eth0")
	b.Must(err)
	b.Must(b.node.Detach(t.Context(), "c1", "eth0"))
	b.Destroyed = nil
	// A set of that name with another type: the transaction fails.
	b.run("nft delete table ip kube2iam-cni")
	b.run("nft add table ip kube2iam-cni")
	b.run("nft add set ip kube2iam-cni routed { type inet_service; }")
	if err := b.attachRunning(t.Context(), r); err == nil {
		t.Error("no error")
	}
	b.WantDestroyed("after a failure")
	if got := b.Recorded(); len(got) > 0 || strings.Contains(b.AllRules(), "c1@eth0") {
		t.Errorf("after a failure: records %v, rules\n%s", got, b.AllRules())
	}
	b.run("nft delete table ip kube2iam-cni")
	b.round()
	if diff := cmp.Diff(whole, b.AllRules()); diff != "" {
		t.Errorf("after the next round:\n%s", diff)
	}
	b.WantDestroyed("the next adoption")
}
