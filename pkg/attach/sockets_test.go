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

// TestSocketsAreDestroyedAfterTheRecord holds the order: ADD begins to destroy when the record of
// the new holder is there.
func TestSocketsAreDestroyedAfterTheRecord(t *testing.T) {
	b := newBed(t, "nftables")
	b.attached(b.pod("c1", 7, "10.1.0.5", "fd00:1::5"))
	b.WantDestroyed("ADD", "[8181] [10.1.0.5 fd00:1::5] [c1@eth0]", "queued for 10.1.0.5", "queued for fd00:1::5")
	b.Must(b.Detach(t.Context(), "c1", "eth0"))
	b.WantDestroyed("DEL", "[8181] [10.1.0.5 fd00:1::5] [c1@eth0]")
	b.Must(b.Detach(t.Context(), "c1", "eth0"))
	b.WantDestroyed("a second DEL")

	b.attached(b.pod("c1", 7, "10.1.0.5"))
	b.WantDestroyed("ADD", "[8181] [10.1.0.5] [c1@eth0]", "queued for 10.1.0.5")
	b.attached(b.pod("c2", 8, "10.1.0.5"))
	b.WantDestroyed("ADD without the DEL of the former holder", "[8181] [10.1.0.5] [c1@eth0]", "[8181] [10.1.0.5] [c2@eth0]", "queued for 10.1.0.5")
	b.Must(b.Detach(t.Context(), "c1", "eth0"))
	b.WantDestroyed("the late DEL")

	b.Must(b.DetachAll(t.Context(), func(*attachment.Record) bool { return true }))
	b.WantDestroyed("GC", "[8181] [10.1.0.5] [c2@eth0]")
}

// TestSocketsOfAFormerPort has the proxy's port change between ADD and DEL.
func TestSocketsOfAFormerPort(t *testing.T) {
	b := newBed(t, "nftables")
	b.attached(b.pod("c1", 7, "10.1.0.5", "fd00:1::5"))
	b.WantDestroyed("ADD", "[8181] [10.1.0.5 fd00:1::5] [c1@eth0]", "queued for 10.1.0.5", "queued for fd00:1::5")
	b.ProxyPort = 9000
	b.Must(b.Detach(t.Context(), "c1", "eth0"))
	b.WantDestroyed("DEL", "[9000 8181] [10.1.0.5 fd00:1::5] [c1@eth0]")
}

// TestAddGoesOnWhereSocketsCannotBeDestroyed has a kernel without SOCK_DESTROY, and one on which it
// fails.
func TestAddGoesOnWhereSocketsCannotBeDestroyed(t *testing.T) {
	b := newBed(t, "nftables")
	b.DestroyErr = fmt.Errorf("%w: %w", sockdiag.ErrUnsupported, unix.EOPNOTSUPP)
	b.attached(b.pod("c1", 7, "10.1.0.5"))
	if logged := b.Logged(); strings.Count(logged, "cannot destroy TCP sockets") != 1 || !strings.Contains(logged, unix.EOPNOTSUPP.Error()) {
		t.Errorf("ADD logged %q", logged)
	}
	rules := b.AllRules()
	b.DestroyErr = unix.ENOBUFS
	if _, err := b.Attach(t.Context(), b.pod("c2", 8, "10.1.0.6")); !errors.Is(err, unix.ENOBUFS) {
		t.Errorf("ADD where sockets may be left: %v, want %v", err, unix.ENOBUFS)
	}
	if diff := cmp.Diff([]string{"c1@eth0"}, b.Recorded()); diff != "" {
		t.Errorf("records after a failed ADD:\n%s", diff)
	}
	if diff := cmp.Diff(rules, b.AllRules()); diff != "" {
		t.Errorf("rules after a failed ADD:\n%s", diff)
	}
	b.Must(b.Detach(t.Context(), "c1", "eth0"))
	if got := b.Recorded(); len(got) != 0 {
		t.Errorf("records after DEL: %v", got)
	}
}
