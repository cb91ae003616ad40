package attachment

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
)

// TestLockTimeout waits for a process that never releases the lock.
func TestLockTimeout(t *testing.T) {
	d := newDir(t)
	put(t, d, record("a", "10.1.0.5"))
	unlock, err := d.LockExclusive(t.Context())
	step(t, err)
	defer unlock()
	synctest.Test(t, func(t *testing.T) {
		for name, lock := range map[string]func(context.Context) (func(), error){
			"ADD":       func(ctx context.Context) (func(), error) { return d.LockAdd(ctx, record("a", "10.1.0.6")) },
			"DEL":       func(ctx context.Context) (func(), error) { return d.LockDelete(ctx, "a", "eth0") },
			"probe":     d.LockShared,
			"agent":     d.LockExclusive,
			"no record": func(ctx context.Context) (func(), error) { return d.LockDelete(ctx, "b", "eth0") },
		} {
			start := time.Now()
			if _, err := lock(t.Context()); !errors.Is(err, ErrLocked) || time.Since(start) != lockTimeout {
				t.Errorf("%s: got %v after %v, want %v after %v", name, err, time.Since(start), ErrLocked, lockTimeout)
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			start = time.Now()
			if _, err := lock(ctx); !errors.Is(err, ErrLocked) || time.Since(start) != time.Second {
				t.Errorf("%s: got %v after %v", name, err, time.Since(start))
			}
		}
	})
}

// tryLock calls lock with a context that has ended, so it does not wait, and reports whether it
// locked.
func tryLock(t *testing.T, lock func(context.Context) (func(), error)) bool {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	unlock, err := lock(ctx)
	if err != nil && !errors.Is(err, ErrLocked) {
		t.Fatal(err)
	}
	if err == nil {
		unlock()
	}
	return err == nil
}

// TestExclusion has a record of "a" with 10.1.0.5 and 10.1.0.6, an unreadable one of "u" with
// 10.1.0.9, and the address 10.1.0.8 of "k", which a killed process left.
func TestExclusion(t *testing.T) {
	type lock = func(Dir) func(context.Context) (func(), error)
	add := func(containerID string, ips ...string) lock {
		return func(d Dir) func(context.Context) (func(), error) {
			return func(ctx context.Context) (func(), error) { return d.LockAdd(ctx, record(containerID, ips...)) }
		}
	}
	del := func(containerID string) lock {
		return func(d Dir) func(context.Context) (func(), error) {
			return func(ctx context.Context) (func(), error) { return d.LockDelete(ctx, containerID, "eth0") }
		}
	}
	shared := func(d Dir) func(context.Context) (func(), error) { return d.LockShared }
	exclusive := func(d Dir) func(context.Context) (func(), error) { return d.LockExclusive }
	for name, tc := range map[string]struct {
		first, second lock
		isExcluded    bool
	}{
		"two ADDs with one address":                          {add("x", "10.1.0.1", "10.1.0.2"), add("y", "10.1.0.2"), true},
		"two ADDs with two addresses":                        {add("x", "10.1.0.1"), add("y", "10.1.0.2"), false},
		"two ADDs of one attachment":                         {add("x", "10.1.0.1"), add("x", "10.1.0.2"), true},
		"DEL and the ADD of the next holder":                 {del("a"), add("x", "10.1.0.5"), true},
		"an ADD and the DEL of the former holder":            {add("x", "10.1.0.5"), del("a"), true},
		"an ADD and an ADD with the former holder's address": {add("x", "10.1.0.5"), add("y", "10.1.0.6"), true},
		"a second ADD and an ADD with its former address":    {add("a", "10.1.0.7"), add("y", "10.1.0.6"), true},
		"DEL of an unreadable record and the next ADD":       {del("u"), add("x", "10.1.0.9"), true},
		"DEL after a killed process and the next ADD":        {del("k"), add("x", "10.1.0.8"), true},
		"two DELs of one attachment":                         {del("a"), del("a"), true},
		"two DELs":                                           {del("a"), del("b"), false},
		"an ADD and a DEL":                                   {add("x", "10.1.0.1"), del("a"), false},
		"an ADD and the agent":                               {add("x", "10.1.0.1"), exclusive, true},
		"a DEL and the agent":                                {del("a"), exclusive, true},
		"the agent and an ADD":                               {exclusive, add("x", "10.1.0.1"), true},
		"an ADD and a probe":                                 {add("x", "10.1.0.1"), shared, false},
		"a probe and the agent":                              {shared, exclusive, true},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDir(t)
			put(t, d, record("a", "10.1.0.5", "10.1.0.6"))
			put(t, d, record("u", "10.1.0.9"))
			put(t, d, record("k", "10.1.0.8"))
			killed := d.recordFile("k", "eth0")
			step(t, os.Truncate(d.recordFile("u", "eth0"), 0), os.Rename(killed, temporary(killed)))
			unlock, err := tc.first(d)(t.Context())
			step(t, err)
			if got := !tryLock(t, tc.second(d)); got != tc.isExcluded {
				t.Errorf("excluded: %v, want %v", got, tc.isExcluded)
			}
			unlock()
			if !tryLock(t, tc.second(d)) {
				t.Error("excluded after the release")
			}
		})
	}
}

// TestLockFollowsTheRecord waits with a DEL for an ADD that changes the attachment's address. The
// DEL then excludes an ADD with the new address.
func TestLockFollowsTheRecord(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDir(t)
		put(t, d, record("a", "10.1.0.5"))
		endAdd, err := d.LockAdd(t.Context(), record("a", "10.1.0.6"))
		step(t, err)
		locked := make(chan func())
		go func() {
			unlock, err := d.LockDelete(t.Context(), "a", "eth0")
			if err != nil {
				t.Error(err)
			}
			locked <- unlock
		}()
		synctest.Wait()
		put(t, d, record("a", "10.1.0.6"))
		endAdd()
		unlock := <-locked
		next := func(ctx context.Context) (func(), error) { return d.LockAdd(ctx, record("b", "10.1.0.6")) }
		if tryLock(t, next) {
			t.Error("an ADD with the new address is not excluded")
		}
		unlock()
		if !tryLock(t, next) {
			t.Error("the ADD is excluded after the release")
		}
	})
}

// TestLockOfARemovedFile removes the lock file, as uninstall does, while an ADD waits. The ADD
// locks the file that later processes lock.
func TestLockOfARemovedFile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDir(t)
		endUninstall, err := d.LockExclusive(t.Context())
		step(t, err)
		locked := make(chan func())
		go func() {
			unlock, err := d.LockShared(t.Context())
			if err != nil {
				t.Error(err)
			}
			locked <- unlock
		}()
		synctest.Wait()
		step(t, os.Remove(filepath.Join(d.root, lockFile)))
		endUninstall()
		unlock := <-locked
		defer unlock()
		if tryLock(t, d.LockExclusive) {
			t.Error("a later process locked another file")
		}
	})
}

// TestLockDeleteWithoutStateDirectory does not create the directory.
func TestLockDeleteWithoutStateDirectory(t *testing.T) {
	d := newDir(t)
	if _, err := d.LockDelete(t.Context(), "a", "eth0"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v, want %v", err, os.ErrNotExist)
	}
	if _, err := os.Stat(d.root); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the directory was created: %v", err)
	}
}

// TestLocksOfAKilledProcess kills a process that holds the locks of an ADD.
func TestLocksOfAKilledProcess(t *testing.T) {
	const variable = "TEST_LOCK_STATE_DIR"
	if dir := os.Getenv(variable); dir != "" {
		_, err := In(dir).LockAdd(t.Context(), record("a", "10.1.0.5"))
		step(t, err)
		fmt.Println("locked")
		select {}
	}
	d := newDir(t)
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), variable+"="+d.root)
	out, err := cmd.StdoutPipe()
	step(t, err, cmd.Start())
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "locked\n" {
		t.Fatalf("got %q, %v", line, err)
	}
	next := func(ctx context.Context) (func(), error) { return d.LockAdd(ctx, record("b", "10.1.0.5")) }
	if tryLock(t, next) {
		t.Error("the address is not locked")
	}
	step(t, cmd.Process.Kill())
	cmd.Wait()
	if !tryLock(t, next) || !tryLock(t, d.LockExclusive) {
		t.Error("the locks of a killed process are held")
	}
}

// TestConcurrentAttachments takes the same addresses for several attachments while readers look
// them up. Readers find whole records, and none after its Delete. In the end each address's entry
// is the record of its holder.
func TestConcurrentAttachments(t *testing.T) {
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
				r := record(id, ips...)
				unlock, err := d.LockAdd(t.Context(), r)
				if err != nil {
					t.Error(err)
					return
				}
				if err := d.Put(r); err != nil {
					t.Error(err)
				}
				unlock()
				look(netip.MustParseAddr(ips[0]))
				if i == rounds-1 && a%2 == 0 {
					return
				}
				if unlock, err = d.LockDelete(t.Context(), id, "eth0"); err != nil {
					t.Error(err)
					return
				}
				if err := d.Delete(id, "eth0"); err != nil {
					t.Error(err)
				}
				unlock()
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
			t.Errorf("%s does not link to the record of %s", name, holder.ID())
		}
	}
}
