package attachment

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
)

// TestLockIsBounded is another process that holds the lock for ever: its time is that of the test's bubble.
func TestLockIsBounded(t *testing.T) {
	d := newDir(t)
	put(t, d, record("a", "10.1.0.5"))
	unlock, err := Lock(t.Context(), filepath.Join(d.root, "lock"))
	if err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		for name, change := range map[string]func() error{
			"Put":    func() error { return d.Put(t.Context(), record("a", "10.1.0.6")) },
			"Delete": func() error { return d.Delete(t.Context(), "a", "eth0") },
		} {
			if err := change(); !errors.Is(err, ErrLocked) {
				t.Errorf("%s: got %v, want %v", name, err, ErrLocked)
			}
		}
		if waited := time.Since(start); waited != 2*lockWait {
			t.Errorf("waited %v, want %v", waited, 2*lockWait)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		start = time.Now()
		if err := d.Delete(ctx, "a", "eth0"); !errors.Is(err, ErrLocked) || time.Since(start) != time.Second {
			t.Errorf("got %v after %v", err, time.Since(start))
		}
	})
	wantHolders(t, d, map[string]string{"10.1.0.5": "a"})
	unlock()
	del(t, d, "a")
}

// TestConcurrently has attachments fight for the same addresses while readers look on. A record that is seen is whole,
// none is seen after its Delete, and in the end each address's entry is one file with the record of who holds it.
func TestConcurrently(t *testing.T) {
	const attachments, rounds = 6, 30
	d := newDir(t)
	index := NewIndex(d)
	pool := []string{"10.1.0.1", "10.1.0.2", "10.1.0.3", "fd00:1::1"}
	done := make(chan struct{})
	var writers, readers sync.WaitGroup
	look := func(ip netip.Addr) *Record {
		r, err := index.Holder(ip)
		if err != nil {
			t.Errorf("Holder(%s): %v", ip, err)
			return nil
		}
		if r != nil && (r.Pod.UID != "uid-"+r.ContainerID || len(r.IPs) != 2 || r.IPs[0] != ip && r.IPs[1] != ip) {
			t.Errorf("Holder(%s): %+v", ip, r)
		}
		return r
	}
	for range 2 {
		readers.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-done:
					return
				default:
					look(netip.MustParseAddr(pool[i%len(pool)]))
				}
			}
		})
	}
	for a := range attachments {
		writers.Go(func() {
			id := fmt.Sprint("c", a)
			for i := range rounds {
				ips := []string{pool[(a+i)%len(pool)], pool[(a+i+1)%len(pool)]}
				if err := d.Put(t.Context(), record(id, ips...)); err != nil {
					t.Error(err)
				}
				look(netip.MustParseAddr(ips[0]))
				if i == rounds-1 && a%2 == 0 {
					return
				}
				if err := d.Delete(t.Context(), id, "eth0"); err != nil {
					t.Error(err)
				}
				for _, ip := range ips {
					if r := look(netip.MustParseAddr(ip)); r != nil && r.ContainerID == id {
						t.Errorf("%s holds %s after its Delete", id, ip)
					}
				}
			}
		})
	}
	writers.Wait()
	close(done)
	readers.Wait()

	records, err := d.List()
	if err != nil || len(records) != attachments/2 {
		t.Errorf("List: %v, %v", records, err)
	}
	for _, name := range names(t, d.byIP()) {
		holder, err := d.Holder(netip.MustParseAddr(name))
		if err != nil {
			t.Error(err)
			continue
		}
		var entry, file unix.Stat_t
		if err := errors.Join(unix.Stat(filepath.Join(d.byIP(), name), &entry), unix.Stat(d.recordFile(holder.ContainerID, "eth0"), &file)); err != nil {
			t.Error(err)
		}
		if entry.Ino != file.Ino {
			t.Errorf("%s is not the record of %s", name, holder.ID())
		}
	}
}
