package credentials

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
)

// has reports whether the cache has credentials for the assumption.
func has(c *Cache, a roles.Assumption) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.entries[a]
	return e != nil && e.document != nil
}

// mustGet requests the assumption for a pod that requests no other.
func mustGet(t *testing.T, c *Cache, a roles.Assumption) *Document {
	t.Helper()
	return mustGetFor(t, c, "pod of "+a.RoleARN, a)
}

func mustGetFor(t *testing.T, c *Cache, pod string, a roles.Assumption) *Document {
	t.Helper()
	d, err := c.Get(t.Context(), pod, a)
	if err != nil {
		t.Fatalf("%s: %v", a.RoleARN, err)
	}
	return d
}

func TestConcurrentRequestsShareOneCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := &fakeSTS{latency: 150 * time.Millisecond}
		c := running(t, sts, Config{})
		var wg sync.WaitGroup
		for range 100 {
			wg.Go(func() {
				if _, err := c.Get(t.Context(), "pod", assumption("a")); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if n := sts.count(); n != 1 {
			t.Errorf("%d calls of STS, want 1", n)
		}
	})
}

func TestCancelledRequestDoesNotCancelOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := &fakeSTS{latency: 5 * time.Second}
		c := running(t, sts, Config{})
		leader, leave := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := c.Get(leader, "pod", assumption("a")); !errors.Is(err, context.Canceled) {
				t.Errorf("the leader: %v", err)
			}
		})
		synctest.Wait()
		for range 10 {
			wg.Go(func() {
				if _, err := c.Get(t.Context(), "pod", assumption("a")); err != nil {
					t.Errorf("a follower: %v", err)
				}
			})
		}
		time.Sleep(time.Second)
		leave()
		wg.Wait()
		if n := sts.count(); n != 1 {
			t.Errorf("%d calls of STS, want 1", n)
		}
	})
}

func TestIMDS24CallContinuesWithoutClients(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := &fakeSTS{latency: 2 * time.Second}
		c := running(t, sts, Config{})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := c.Get(ctx, "pod", assumption("a")); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("%v", err)
		}
		time.Sleep(1500 * time.Millisecond) // until an SDK retries
		start := time.Now()
		mustGet(t, c, assumption("a"))
		if waited := time.Since(start); waited != 0 || sts.count() != 1 {
			t.Errorf("the second request waited %v after %d calls", waited, sts.count())
		}
	})
}

func TestEachAssumeRoleParameterIsInKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := &fakeSTS{}
		c := running(t, sts, Config{})
		a := assumption("a")
		others := map[string]roles.Assumption{}
		for name, change := range map[string]func(*roles.Assumption){
			"role": func(a *roles.Assumption) { a.RoleARN += "x" }, "session name": func(a *roles.Assumption) { a.SessionName += "x" },
			"external ID": func(a *roles.Assumption) { a.ExternalID = "id" }, "duration": func(a *roles.Assumption) { a.Duration += time.Second },
			"source identity": func(a *roles.Assumption) { a.SourceIdentity = "x" }, "session policy": func(a *roles.Assumption) { a.SessionPolicy = "{}" },
			"tag": func(a *roles.Assumption) { a.Tags.PodName = "x" }, "another tag": func(a *roles.Assumption) { a.Tags.Namespace = "x" },
		} {
			b := a
			change(&b)
			others[name] = b
		}
		first := mustGet(t, c, a)
		for name, b := range others {
			if mustGet(t, c, b) == first {
				t.Errorf("another %s got the same credentials", name)
			}
		}
		if mustGet(t, c, a) != first || sts.count() != 1+len(others) {
			t.Errorf("%d calls for %d assumptions", sts.count(), 1+len(others))
		}
	})
}

func TestErrorsAreCachedByAssumption(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := &fakeSTS{refuse: func(a roles.Assumption) error {
			if a.ExternalID != "right" {
				return &Error{Kind: Denied, Code: "AccessDenied"}
			}
			return nil
		}}
		c := running(t, sts, Config{})
		owner, other := assumption("a"), assumption("a")
		owner.ExternalID = "right"
		if _, err := c.Get(t.Context(), "pod", other); err == nil {
			t.Error("without the external ID: credentials")
		}
		mustGet(t, c, owner)
		if _, err := c.Get(t.Context(), "pod", other); err == nil {
			t.Error("after the owner warmed the cache: credentials without the external ID")
		}
	})
}

func TestCallTimesOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := running(t, &fakeSTS{latency: time.Hour}, Config{})
		start := time.Now()
		if _, err := c.Get(t.Context(), "pod", assumption("a")); err == nil || time.Since(start) != flightTimeout {
			t.Errorf("%v after %v", err, time.Since(start))
		}
	})
}

// TestErrorsAreCachedBriefly checks for how long, at least and at most, each kind of error is
// cached.
func TestErrorsAreCachedBriefly(t *testing.T) {
	for kind, bound := range map[Kind][2]time.Duration{
		Malformed: {5 * time.Minute, 5 * time.Minute}, Denied: {30 * time.Second, 30 * time.Second},
		Throttled: {time.Second, 2 * time.Second}, Unavailable: {250 * time.Millisecond, 500 * time.Millisecond},
	} {
		t.Run(string(kind), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				sts := &fakeSTS{err: &Error{Kind: kind, Code: "x"}}
				c := running(t, sts, Config{})
				ask := func() {
					t.Helper()
					if _, err := c.Get(t.Context(), "pod", assumption("a")); err == nil {
						t.Fatal("credentials")
					}
				}
				for range 50 {
					ask()
				}
				time.Sleep(bound[0] - time.Millisecond)
				ask()
				if n := sts.count(); n != 1 {
					t.Errorf("%d calls while the error is cached, want 1", n)
				}
				sts.set(func(s *fakeSTS) { s.err = nil })
				time.Sleep(bound[1] - bound[0] + 2*time.Millisecond)
				mustGet(t, c, assumption("a"))
			})
		})
	}
}

func TestConfiguredErrorTTL(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := &fakeSTS{err: errors.New("down")}
		c := running(t, sts, Config{Schedule: Schedule{ErrorTTL: 5 * time.Minute}})
		for range 4 {
			c.Get(t.Context(), "pod", assumption("a"))
			time.Sleep(time.Minute)
		}
		if n := sts.count(); n != 1 {
			t.Errorf("%d calls, want 1", n)
		}
	})
}

func TestPrefetchesAreLimitedAndRequestsGoFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := &fakeSTS{latency: time.Second}
		c := running(t, sts, Config{})
		for i := range 110 {
			c.Hold(fmt.Sprint(i), assumption(fmt.Sprint(i)))
		}
		synctest.Wait()
		if sts.peak > maxBackgroundCalls {
			t.Errorf("%d calls at once, want at most %d", sts.peak, maxBackgroundCalls)
		}
		start := time.Now()
		mustGet(t, c, assumption("109")) // queued behind all others
		if waited := time.Since(start); waited > time.Second {
			t.Errorf("a request waited %v behind prefetches", waited)
		}
		time.Sleep(time.Minute)
		if n := sts.count(); n != 110 {
			t.Errorf("%d calls for 110 pods", n)
		}
	})
}

func TestEndedCacheReturnsErrClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCache(&fakeSTS{latency: time.Hour}, Config{Log: discard})
		ctx, cancel := context.WithCancel(t.Context())
		c.Hold("uid", assumption("a"))
		time.AfterFunc(time.Second, cancel)
		if err := c.Run(ctx); err != nil { // does not wait for the flight, which would take an hour
			t.Error(err)
		}
		if _, err := c.Get(context.Background(), "pod", assumption("b")); !errors.Is(err, ErrClosed) {
			t.Errorf("%v, want ErrClosed", err)
		}
	})
}

func TestEndedCacheServesValidCredentials(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCache(&fakeSTS{}, Config{Log: discard})
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- c.Run(ctx) }()
		mustGet(t, c, assumption("a"))
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		time.Sleep(50 * time.Minute) // less than minRemaining is left, so a request tries to renew
		mustGet(t, c, assumption("a"))
	})
}

func TestPending(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := &fakeSTS{latency: time.Second, refuse: func(a roles.Assumption) error {
			if a == assumption("denied") {
				return &Error{Kind: Denied}
			}
			return nil
		}}
		c := running(t, sts, Config{})
		c.Hold("one", assumption("denied"))
		c.Hold("two", assumption("a"))
		if n := c.Stats().Pending; n != 2 {
			t.Errorf("%d are pending", n)
		}
		time.Sleep(2 * time.Second)
		var wg sync.WaitGroup
		wg.Go(func() { mustGet(t, c, assumption("unheld")) })
		synctest.Wait()
		if n := c.Stats().Pending; n != 0 {
			t.Errorf("%d are pending", n)
		}
		wg.Wait()
	})
}
