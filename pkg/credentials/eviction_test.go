package credentials

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// TestCacheIsBounded fills the cache with requested entries, then with held ones.
func TestCacheIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := new(fakeSTS)
		c := running(t, sts, Config{})
		c.Hold("pod", assumption("held"))
		mustGet(t, c, assumption("held"))
		c.mu.Lock()
		for i := range maxEntries - 1 {
			e := &entry{idleUntil: time.Now().Add(time.Duration(i+1) * time.Millisecond)}
			e.document, e.renewAt = c.entries[assumption("held")].document, time.Now().Add(time.Hour)
			c.entries[assumption(fmt.Sprint(i))] = e
		}
		c.mu.Unlock()
		mustGet(t, c, assumption("one more"))
		if !has(c, assumption("held")) || !has(c, assumption("one more")) {
			t.Error("a held entry was evicted, or the new one was not stored")
		}
		c.mu.Lock()
		for a, e := range c.entries {
			if a != assumption("held") {
				e.holders++
			}
		}
		n := len(c.entries)
		c.mu.Unlock()
		if _, err := c.Get(t.Context(), "pod", assumption("two more")); err == nil || classify(err).Kind != Throttled {
			t.Errorf("%v, want Throttled: all entries are held", err)
		}
		c.Hold("another pod", assumption("three more"))
		if n != maxEntries || c.Stats().Entries != n {
			t.Errorf("%d entries, then %d", n, c.Stats().Entries)
		}
		c.Hold("pod", assumption("four more")) // replaces the one that it held
		synctest.Wait()
		if c.Stats().Entries != n || !has(c, assumption("four more")) {
			t.Errorf("%d entries after a pod's change", c.Stats().Entries)
		}
	})
}

func TestCredentialsAreRemovedWithLastHolder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := &fakeSTS{}
		c := running(t, sts, Config{})
		a := assumption("a")
		c.Hold("one", a)
		c.Hold("two", a)
		c.Hold("two", a)
		synctest.Wait()
		c.Release("one")
		if !has(c, a) {
			t.Error("removed with the first holder")
		}
		c.Release("two")
		c.Release("two")
		if has(c, a) {
			t.Error("kept after the last holder")
		}
		time.Sleep(24 * time.Hour)
		if n := sts.count(); n != 1 {
			t.Errorf("%d calls: renewed without a holder", n)
		}
	})
}

func TestFormerRoleIsRemoved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := running(t, &fakeSTS{}, Config{})
		c.Hold("uid", assumption("old"))
		synctest.Wait()
		c.Hold("uid", assumption("new"))
		synctest.Wait()
		if has(c, assumption("old")) || !has(c, assumption("new")) {
			t.Error("the old role is kept, or the new one is not prefetched")
		}
	})
}

func TestPodChurnLeavesNoState(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := running(t, &fakeSTS{latency: 300 * time.Millisecond}, Config{})
		for i := range 1000 {
			uid, a := fmt.Sprint(i), assumption(fmt.Sprint(i%37))
			c.Hold(uid, a)
			if i%3 == 0 {
				ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
				c.Get(ctx, uid, a)
				cancel()
			}
			c.Forget(uid)
		}
		time.Sleep(3 * time.Minute)
		c.mu.Lock()
		defer c.mu.Unlock()
		if len(c.entries) != 0 || len(c.holders) != 0 {
			t.Errorf("%d entries and %d holders are left", len(c.entries), len(c.holders))
		}
	})
}

func TestEvictionSparesEntriesWithFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := &fakeSTS{latency: time.Second}
		c := running(t, sts, Config{})
		var wg sync.WaitGroup
		wg.Go(func() { mustGet(t, c, assumption("flies")) })
		synctest.Wait()
		c.mu.Lock()
		for i := range maxEntries - 1 {
			c.entries[assumption(fmt.Sprint(i))] = &entry{idleUntil: time.Now().Add(time.Hour)}
		}
		c.mu.Unlock()
		wg.Go(func() { mustGet(t, c, assumption("new")) })
		synctest.Wait()
		wg.Go(func() { mustGet(t, c, assumption("flies")) })
		wg.Wait()
		if n := sts.calls[assumption("flies")]; n != 1 {
			t.Errorf("%d concurrent calls for one assumption", n)
		}
	})
}

func TestRequestedCredentialsAreRemovedWithLastHolder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := running(t, new(fakeSTS), Config{})
		c.Hold("pod", assumption("a"))
		mustGet(t, c, assumption("a"))
		c.Forget("pod")
		if has(c, assumption("a")) {
			t.Error("credentials are kept")
		}
	})
}
