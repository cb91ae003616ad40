package credentials

import (
	"context"
	"errors"
	"fmt"
	"strings"
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
		time.Sleep(1500 * time.Millisecond) // an SDK retries
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

func TestIMDS23HeldCredentialsAreRenewedInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := &fakeSTS{latency: 100 * time.Millisecond}
		c := running(t, sts, Config{})
		a := assumption("a")
		c.Hold("uid", a)
		time.Sleep(time.Second)
		const hours = 24
		for range hours * 60 {
			start := time.Now()
			d := mustGet(t, c, a)
			if left := time.Until(d.Expiration()); left < 1500*time.Second {
				t.Fatalf("%v left", left)
			}
			if waited := time.Since(start); waited != 0 {
				t.Fatalf("a request waited %v", waited)
			}
			time.Sleep(time.Minute)
		}
		if n := sts.count(); n > hours*24/10+1 {
			t.Errorf("%d calls in %d hours, more than 2.4 an hour", n, hours)
		}
	})
}

// TestOutageOf29MinutesCausesNoRefusal starts the outage at various times, also when all renewals
// are due or have just begun.
func TestOutageOf29MinutesCausesNoRefusal(t *testing.T) {
	for _, after := range []time.Duration{time.Second, 2 * time.Minute, 10 * time.Minute, 25 * time.Minute, 29*time.Minute + 59*time.Second, 30*time.Minute + time.Second, 200 * time.Minute} {
		t.Run(after.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				sts := new(fakeSTS)
				c := running(t, sts, Config{})
				for i := range 200 {
					c.Hold(fmt.Sprint(i), assumption(fmt.Sprint(i)))
				}
				time.Sleep(after)
				before := sts.count()
				sts.set(func(s *fakeSTS) { s.err = &Error{Kind: Unavailable, Code: "RequestError"}; s.latency = 5 * time.Second })
				least := time.Hour
				for outage := time.Now(); time.Since(outage) < 29*time.Minute; {
					for i := range 200 {
						d, err := c.Get(t.Context(), fmt.Sprint(i), assumption(fmt.Sprint(i)))
						if err != nil {
							t.Fatal(err)
						}
						left := time.Until(d.Expiration())
						if least = min(least, left); left <= 0 {
							t.Fatal("expired credentials")
						}
					}
					time.Sleep(10 * time.Second)
				}
				if after >= 25*time.Minute && (least > 15*time.Minute || sts.count() < before+200) {
					t.Errorf("credentials had at least %v left, %d calls during the outage: the outage had no effect", least, sts.count()-before)
				}
				sts.set(func(s *fakeSTS) { s.err, s.latency = nil, 0 })
				time.Sleep(3 * time.Minute)
				for i := range 200 {
					if left := time.Until(mustGet(t, c, assumption(fmt.Sprint(i))).Expiration()); left < 1500*time.Second {
						t.Fatalf("three minutes after the outage: %v left", left)
					}
				}
			})
		})
	}
}

// TestLatestExpirationIsServed checks that a renewal does not replace credentials that expire
// later.
func TestLatestExpirationIsServed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := new(fakeSTS)
		c := running(t, sts, Config{})
		a := assumption("a")
		c.Hold("pod", a)
		synctest.Wait()
		first := mustGet(t, c, a)
		sts.set(func(s *fakeSTS) { s.lifetime = 15 * time.Minute })
		for sts.count() == 1 {
			time.Sleep(time.Minute)
		}
		if left := time.Until(first.Expiration()); left > 15*time.Minute && mustGet(t, c, a) != first {
			t.Errorf("credentials with %v left were replaced by ones that expire earlier", left)
		}
		time.Sleep(time.Until(first.Expiration()) - 10*time.Minute)
		if mustGet(t, c, a) == first {
			t.Error("credentials were not replaced by ones that expire later")
		}
	})
}

// TestValidCredentialsAreServedDuringSlowRenewal lets requests start a renewal while STS is slow.
func TestValidCredentialsAreServedDuringSlowRenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := new(fakeSTS)
		c := running(t, sts, Config{})
		a := assumption("a")
		c.Hold("pod", a)
		synctest.Wait()
		first := mustGet(t, c, a)
		sts.set(func(s *fakeSTS) { s.latency = 10 * time.Second; s.err = errors.New("down") })
		time.Sleep(50 * time.Minute)
		for range 100 {
			start := time.Now()
			if mustGet(t, c, a) != first {
				t.Fatal("other credentials were served")
			}
			if waited := time.Since(start); waited > 200*time.Millisecond {
				t.Fatalf("a request waited %v although valid credentials were cached", waited)
			}
			time.Sleep(time.Second)
		}
		sts.set(func(s *fakeSTS) { s.latency, s.err = 100*time.Millisecond, nil })
		time.Sleep(time.Minute)
		if mustGet(t, c, a) == first {
			t.Error("not renewed")
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

// TestCacheIsBounded fills the cache with requested, then with held entries.
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

func TestExpiredCredentialsAreNeverServed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := &fakeSTS{}
		c := running(t, sts, Config{})
		a := assumption("a")
		c.Hold("uid", a)
		time.Sleep(time.Second)
		sts.set(func(s *fakeSTS) { s.err = errors.New("down") })
		time.Sleep(time.Hour)
		if d, err := c.Get(t.Context(), "pod", a); err == nil {
			t.Errorf("%v", d)
		}
		sts.set(func(s *fakeSTS) { s.err = nil })
		time.Sleep(3 * time.Minute)
		mustGet(t, c, a)
	})
}

// TestErrorsAreCachedBriefly checks the shortest and the longest time that each kind of error is
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

func TestShortSessionsScaleDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := &fakeSTS{lifetime: 15 * time.Minute} // instead of the requested duration
		c := running(t, sts, Config{})
		a := assumption("a")
		c.Hold("uid", a)
		for range 240 {
			time.Sleep(time.Minute)
			if left := time.Until(mustGet(t, c, a).Expiration()); left < 375*time.Second {
				t.Fatalf("%v left of 15 minutes", left)
			}
		}
		if n := sts.count(); n < 24 || n > 45 {
			t.Errorf("%d calls in four hours of sessions of 15 minutes", n)
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

// TestExpiredNewCredentialsMeanClockSkew lets STS issue credentials that have expired by the node's
// clock.
func TestExpiredNewCredentialsMeanClockSkew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		failed := make(chan *Error, 1)
		c := running(t, &fakeSTS{lifetime: -time.Minute}, Config{Failed: func(_ string, _ roles.Assumption, err *Error) { failed <- err }})
		c.Hold("pod", assumption("a"))
		d, err := c.Get(t.Context(), "pod", assumption("a"))
		if e, ok := errors.AsType[*Error](err); !ok || d != nil || e.Kind != ClockSkew || e.Code != "ExpiredCredentials" || !strings.Contains(e.Cause, "have already ended") {
			t.Errorf("%v, %v", d, err)
		}
		if e := <-failed; e.Kind != ClockSkew {
			t.Errorf("reported to its holder: %v", e)
		}
	})
}

// observed is an Observer that counts.
type observed struct {
	mu           sync.Mutex
	assumed      map[string]int
	hits, misses int
	longest      time.Duration
}

func (o *observed) Assumed(outcome string, took time.Duration) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.assumed == nil {
		o.assumed = map[string]int{}
	}
	o.assumed[outcome]++
	o.longest = max(o.longest, took)
}

func (o *observed) Asked(hit bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if hit {
		o.hits++
	} else {
		o.misses++
	}
}

func TestObserverCountsCallsAndHits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := new(observed)
		sts := &fakeSTS{latency: time.Second}
		c := running(t, sts, Config{Observer: o})
		mustGet(t, c, assumption("a"))
		mustGet(t, c, assumption("a"))
		sts.set(func(s *fakeSTS) { s.err = &Error{Kind: Denied} })
		for range 2 { // the second gets the cached error
			if _, err := c.Get(t.Context(), "pod", assumption("b")); err == nil {
				t.Error("credentials")
			}
		}
		if o.assumed["ok"] != 1 || o.assumed["denied"] != 1 || o.longest != time.Second || o.hits != 2 || o.misses != 2 {
			t.Errorf("%+v", o)
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
