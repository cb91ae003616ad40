package attach

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netns"

	"github.com/kube2iam-cni/kube2iam-cni/test/testhost"
)

// TestParallel has attachments take two addresses from each other by ADDs and late DELs at once. In
// the end each address has the rule of its holder on record, or neither a holder nor a rule.
func TestParallel(t *testing.T) {
	testhost.Backends(t, func(t *testing.T, backend string) {
		b := newBed(t, backend)
		host, err := netns.Get()
		b.Must(err)
		defer host.Close()
		system := b.System
		system.DestroySockets = func([]uint16, []netip.Addr) func() (int, error) { return func() (int, error) { return 0, nil } }
		system.DropQueued = func(netip.Addr) error { return nil }
		ips := []string{"10.1.0.5", "10.1.0.6"}
		const attachments, rounds = 6, 4
		var requests [attachments]Request
		for i := range attachments {
			requests[i] = b.pod(fmt.Sprint("c", i), 10+i, ips...)
		}
		// The node's rules exist before: the nftables library numbers new sets by a global variable,
		// which is safe in the plugin, one process for each call.
		b.attached(b.pod("first", 9, "10.1.0.9"))
		b.Must(b.Detach(t.Context(), "first", "eth0"))
		var group sync.WaitGroup
		for i := range attachments {
			group.Go(func() {
				runtime.LockOSThread() // without an unlock the thread ends with the goroutine
				if err := netns.Set(host); err != nil {
					t.Error(err)
					return
				}
				n := New(b.Settings, system, slog.New(slog.DiscardHandler))
				defer n.Close()
				for round := range rounds {
					req := requests[i]
					req.IPs = req.IPs[(i+round)%2 : (i+round)%2+1]
					if _, err := n.Attach(t.Context(), req); err != nil {
						t.Errorf("ADD of %s: %v", req.ContainerID, err)
					}
					if round == rounds-1 && i == 0 {
						return
					}
					if err := n.Detach(t.Context(), req.ContainerID, req.IfName); err != nil {
						t.Errorf("DEL of %s: %v", req.ContainerID, err)
					}
				}
			})
		}
		group.Wait()
		rules := b.AllRules()
		for _, ip := range ips {
			holder, err := b.Records.Holder(netip.MustParseAddr(ip))
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				t.Error(err)
			}
			for line := range strings.Lines(rules) {
				if !strings.Contains(line, "@eth0") || !strings.Contains(line, ip) {
					continue
				}
				if holder == nil || !strings.Contains(line, holder.ID()) {
					t.Errorf("%s is held by %v and has the rule %s", ip, holder, line)
				}
			}
			if holder != nil && !strings.Contains(rules, holder.ID()) {
				t.Errorf("%s is held by %s, which has no rule:\n%s", ip, holder.ID(), rules)
			}
		}
	})
}

// TestDetachWithoutARecordExcludesADDs has rules whose record is lost. Their DEL waits for a
// running ADD, which could otherwise lose an element that it takes over.
func TestDetachWithoutARecordExcludesADDs(t *testing.T) {
	testhost.Backends(t, func(t *testing.T, backend string) {
		b := newBed(t, backend)
		b.attached(b.pod("c1", 7, "10.1.0.5"))
		rules := b.AllRules()
		b.Must(b.Records.Delete("c1", "eth0"))
		unlock, err := b.Records.LockShared(t.Context()) // as a running ADD
		b.Must(err)
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		if err := b.Detach(ctx, "c1", "eth0"); err == nil {
			t.Error("DEL did not wait for the ADD")
		}
		if after := b.AllRules(); after != rules {
			t.Errorf("during an ADD, DEL changed the rules to\n%s\nfrom\n%s", after, rules)
		}
		unlock()
		b.Must(b.Detach(t.Context(), "c1", "eth0"))
		if after := b.AllRules(); strings.Contains(after, "c1@eth0") {
			t.Errorf("DEL left\n%s", after)
		}
	})
}
