package attach

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/sockdiag"
)

// wantDestroyed wants that sockets were destroyed just so since the last question: ports, peers, and the records that were
// there at that moment.
func (b *bed) wantDestroyed(when string, want ...string) {
	b.Helper()
	if diff := cmp.Diff(want, b.destroyed); diff != "" {
		b.Errorf("%s, sockets destroyed (-want +got):\n%s", when, diff)
	}
	b.destroyed = nil
}

// TestSocketsAreDestroyedAfterTheRecord holds the order: ADD begins to destroy when the record of the new holder is there.
func TestSocketsAreDestroyedAfterTheRecord(t *testing.T) {
	b := newBed(t, "nftables")
	b.attached(b.pod("c1", 7, "10.1.0.5", "fd00:1::5"))
	b.wantDestroyed("ADD", "[8181] [10.1.0.5 fd00:1::5] [c1@eth0]", "queued for 10.1.0.5", "queued for fd00:1::5")
	b.must(b.Detach(t.Context(), "c1", "eth0"))
	b.wantDestroyed("DEL", "[8181] [10.1.0.5 fd00:1::5] [c1@eth0]")
	b.must(b.Detach(t.Context(), "c1", "eth0"))
	b.wantDestroyed("a second DEL")

	b.attached(b.pod("c1", 7, "10.1.0.5"))
	b.wantDestroyed("ADD", "[8181] [10.1.0.5] [c1@eth0]", "queued for 10.1.0.5")
	b.attached(b.pod("c2", 8, "10.1.0.5"))
	b.wantDestroyed("ADD without the DEL of the former holder", "[8181] [10.1.0.5] [c1@eth0]", "[8181] [10.1.0.5] [c2@eth0]", "queued for 10.1.0.5")
	b.must(b.Detach(t.Context(), "c1", "eth0"))
	b.wantDestroyed("the late DEL")

	b.must(b.DetachAll(t.Context(), func(*attachment.Record) bool { return true }))
	b.wantDestroyed("GC", "[8181] [10.1.0.5] [c2@eth0]")
}

// TestSocketsOfAFormerPort has the proxy's port change between ADD and DEL.
func TestSocketsOfAFormerPort(t *testing.T) {
	b := newBed(t, "nftables")
	b.attached(b.pod("c1", 7, "10.1.0.5", "fd00:1::5"))
	b.wantDestroyed("ADD", "[8181] [10.1.0.5 fd00:1::5] [c1@eth0]", "queued for 10.1.0.5", "queued for fd00:1::5")
	b.ProxyPort = 9000
	b.must(b.Detach(t.Context(), "c1", "eth0"))
	b.wantDestroyed("DEL", "[9000 8181] [10.1.0.5 fd00:1::5] [c1@eth0]")
}

// TestAddGoesOnWhereSocketsCannotBeDestroyed has a kernel without SOCK_DESTROY, and one on which it fails.
func TestAddGoesOnWhereSocketsCannotBeDestroyed(t *testing.T) {
	b := newBed(t, "nftables")
	b.destroyErr = fmt.Errorf("%w: %w", sockdiag.ErrUnsupported, unix.EOPNOTSUPP)
	b.attached(b.pod("c1", 7, "10.1.0.5"))
	if said := b.log(); strings.Count(said, "cannot destroy TCP sockets") != 1 || !strings.Contains(said, unix.EOPNOTSUPP.Error()) {
		t.Errorf("ADD said %q", said)
	}
	rules := b.allRules()
	b.destroyErr = unix.ENOBUFS
	if _, err := b.Attach(t.Context(), b.pod("c2", 8, "10.1.0.6")); !errors.Is(err, unix.ENOBUFS) {
		t.Errorf("ADD where sockets may be left: %v, want %v", err, unix.ENOBUFS)
	}
	if diff := cmp.Diff([]string{"c1@eth0"}, b.recorded()); diff != "" {
		t.Errorf("records after a failed ADD:\n%s", diff)
	}
	if diff := cmp.Diff(rules, b.allRules()); diff != "" {
		t.Errorf("rules after a failed ADD:\n%s", diff)
	}
	b.must(b.Detach(t.Context(), "c1", "eth0"))
	if got := b.recorded(); len(got) != 0 {
		t.Errorf("records after DEL: %v", got)
	}
}
