package agent

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
)

// TestRoundWaitsForThePlugin has an ADD that hangs: the agent makes the guard and changes nothing
// else. The time is that of the test's bubble.
func TestRoundWaitsForThePlugin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, "nftables")
		b.round()
		guard := b.AllRules()
		b.attached(b.pod("c1", 7, "10.1.0.5"))
		b.round()
		whole := b.AllRules()
		b.run("nft flush ruleset")
		delete(b.links, 7)
		unlock, err := b.node.Records.LockShared(t.Context())
		b.Must(err)
		files := b.files()
		if err := b.Round(t.Context()); !errors.Is(err, attachment.ErrLocked) {
			t.Errorf("got %v, want %v", err, attachment.ErrLocked)
		}
		if diff := cmp.Diff(guard, b.AllRules()); diff != "" {
			t.Errorf("the rules are not the guard:\n%s", diff)
		}
		if diff := cmp.Diff(files, b.files()); diff != "" {
			t.Errorf("wrote:\n%s", diff)
		}
		b.links[7] = "veth7"
		unlock()
		b.round()
		if diff := cmp.Diff(whole, b.AllRules()); diff != "" {
			t.Errorf("after the ADD:\n%s", diff)
		}
	})
}

// TestRoundExcludesThePlugin tries the plugin's lock while a round collects, and has a round that
// finds nothing wrong take no lock.
func TestRoundExcludesThePlugin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, "nftables")
		b.attached(b.pod("c1", 7, "10.1.0.5"))
		b.attached(b.pod("c2", 8, "10.1.0.6"))
		b.round()
		attempts := 0
		destroy := b.node.DestroySockets
		b.node.DestroySockets = func(ports []uint16, peers []netip.Addr) func() (int, error) {
			attempts++
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			if _, err := b.node.Records.LockShared(ctx); !errors.Is(err, attachment.ErrLocked) {
				t.Errorf("while the agent collects: got %v, want %v", err, attachment.ErrLocked)
			}
			return destroy(ports, peers)
		}
		delete(b.links, 8)
		b.round()
		if got := strings.Join(b.Recorded(), " "); attempts != 1 || got != "c1@eth0" {
			t.Errorf("%d attempts, records %q", attempts, got)
		}
		for name, lock := range map[string]func(context.Context) (func(), error){"an ADD": b.node.Records.LockShared, "another agent": b.node.Records.LockExclusive} {
			unlock, err := lock(t.Context())
			b.Must(err)
			b.idle("while " + name + " changes something")
			unlock()
		}
	})
}
