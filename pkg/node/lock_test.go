package node

import (
	"context"
	"errors"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
)

// TestRoundWaitsForThePlugin has an ADD under way, or one that hangs: while it may change something, the agent does not. The
// time is that of the test's bubble.
func TestRoundWaitsForThePlugin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, "nftables")
		b.attached(b.pod("c1", 7, "10.1.0.5"))
		b.round()
		whole := b.allRules()
		b.run("nft flush ruleset")
		delete(b.links, 7)
		unlock, err := attachment.LockShared(t.Context(), filepath.Join(b.StateDir, "change.lock"))
		b.must(err)
		files := b.files()
		if err := b.Round(t.Context()); !errors.Is(err, attachment.ErrLocked) {
			t.Errorf("got %v, want %v", err, attachment.ErrLocked)
		}
		if rules := b.allRules(); strings.Contains(rules, "kube2iam-cni") {
			t.Errorf("changed the rules:\n%s", rules)
		}
		if diff := cmp.Diff(files, b.files()); diff != "" {
			t.Errorf("wrote:\n%s", diff)
		}
		b.links[7] = "veth7"
		unlock()
		b.round()
		if diff := cmp.Diff(whole, b.allRules()); diff != "" {
			t.Errorf("when it was done:\n%s", diff)
		}
	})
}

// TestRoundHoldsThePluginOff asks for the plugin's lock while a round repairs, and has a round that finds nothing wrong ask
// for none.
func TestRoundHoldsThePluginOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, "nftables")
		b.attached(b.pod("c1", 7, "10.1.0.5"))
		lock := filepath.Join(b.StateDir, "change.lock")
		asked := 0
		b.Cut = func(netip.AddrPort) (int, error) {
			asked++
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			if _, err := attachment.LockShared(ctx, lock); !errors.Is(err, attachment.ErrLocked) {
				t.Errorf("while the agent repairs: got %v, want %v", err, attachment.ErrLocked)
			}
			return 0, nil
		}
		b.run("nft flush ruleset")
		b.round()
		if asked == 0 {
			t.Error("nothing was repaired")
		}

		for name, lockIt := range map[string]func(context.Context, string) (func(), error){"an ADD": attachment.LockShared, "another agent": attachment.Lock} {
			unlock, err := lockIt(t.Context(), lock)
			b.must(err)
			b.idle("while " + name + " changes something")
			unlock()
		}
	})
}
