package credentials

import (
	"bytes"
	"context"
	"log/slog"
	"maps"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
)

func TestFailedPrefetchIsRetried(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := &fakeSTS{err: &Error{Kind: Unavailable}, latency: 10 * time.Millisecond}
		c := running(t, sts, Config{})
		c.Hold("pod", assumption("a"))
		time.Sleep(20 * time.Millisecond)
		sts.set(func(s *fakeSTS) { s.err = nil })
		time.Sleep(3 * time.Second)
		if !has(c, assumption("a")) {
			t.Error("not retried")
		}
	})
}

func TestSuccessResetsFailures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := &fakeSTS{err: &Error{Kind: Unavailable}}
		c := running(t, sts, Config{})
		c.Hold("pod", assumption("a"))
		time.Sleep(10 * time.Minute)
		sts.set(func(s *fakeSTS) { s.err = nil })
		time.Sleep(3 * time.Minute)
		c.mu.Lock()
		defer c.mu.Unlock()
		if e := c.entries[assumption("a")]; e.document == nil || e.failures != 0 {
			t.Errorf("%d failures in a row after a success", e.failures)
		}
	})
}

func TestShutdownLogsNoFailures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		c := newCache(&fakeSTS{latency: time.Hour}, Config{Log: slog.New(slog.NewTextHandler(&log, nil))})
		c.Hold("pod", assumption("a"))
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := c.Run(ctx); err != nil || log.Len() > 0 {
			t.Errorf("%v, logged %s", err, &log)
		}
	})
}

func TestRefusedRoleIsRetriedRarely(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := &fakeSTS{err: &Error{Kind: Denied}}
		c := running(t, sts, Config{})
		c.Hold("pod", assumption("a"))
		time.Sleep(time.Hour)
		if n := sts.count(); n < 30 || n > 41 {
			t.Errorf("%d calls in an hour", n)
		}
	})
}

func TestNewHolderJoinsRunningFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := &fakeSTS{latency: time.Second}
		c := running(t, sts, Config{})
		c.Hold("one", assumption("a"))
		synctest.Wait()
		c.Forget("one")
		c.Hold("two", assumption("a"))
		time.Sleep(2 * time.Second)
		if n := sts.count(); n != 1 || !has(c, assumption("a")) {
			t.Errorf("%d calls", n)
		}
	})
}

// slowToEnd is an STS whose calls take one more second after their context has ended.
type slowToEnd struct{ ended atomic.Bool }

func (s *slowToEnd) AssumeRole(ctx context.Context, _ roles.Assumption) (*Credentials, error) {
	<-ctx.Done()
	time.Sleep(time.Second)
	s.ended.Store(true)
	return nil, ctx.Err()
}

func TestShutdownWaitsForFlights(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := new(slowToEnd)
		c := newCache(sts, Config{Log: slog.New(slog.DiscardHandler)})
		c.Hold("pod", assumption("a"))
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := c.Run(ctx); err != nil || !sts.ended.Load() {
			t.Errorf("%v, or a call is still running", err)
		}
	})
}

// TestEntryWithFlightIsNotRemoved keeps a flight queued for longer than an unheld entry is kept.
func TestEntryWithFlightIsNotRemoved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := new(fakeSTS)
		c := running(t, sts, Config{})
		withoutTokens(c, 1500)
		var wg sync.WaitGroup
		wg.Go(func() { mustGet(t, c, assumption("a")) })
		time.Sleep(2*idleLifetime + 5*time.Second)
		wg.Go(func() { mustGet(t, c, assumption("a")) })
		wg.Wait()
		if n := sts.count(); n != 1 {
			t.Errorf("%d calls", n)
		}
	})
}

// TestThrottledRenewalIsNotReported checks that throttling is reported only for a pod without valid
// credentials.
func TestThrottledRenewalIsNotReported(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		reported := map[string]int{}
		sts := new(fakeSTS)
		c := running(t, sts, Config{Failed: func(holder string, _ roles.Assumption, err *Error) {
			mu.Lock()
			defer mu.Unlock()
			reported[holder+" "+string(err.Kind)]++
		}})
		reports := func() map[string]int {
			mu.Lock()
			defer mu.Unlock()
			return maps.Clone(reported)
		}
		c.Hold("old", assumption("old"))
		synctest.Wait()
		sts.set(func(s *fakeSTS) { s.err = &Error{Kind: Throttled, Code: "Throttling"} })
		c.Hold("new", assumption("new"))
		time.Sleep(50 * time.Minute)
		if h := reports(); sts.count() < 3 || h["new throttled"] == 0 || len(h) != 1 {
			t.Errorf("reported %v", h)
		}
		sts.set(func(s *fakeSTS) { s.err = &Error{Kind: Denied, Code: "AccessDenied"} })
		time.Sleep(5 * time.Minute)
		if h := reports(); h["old denied"] == 0 {
			t.Errorf("a denial: reported %v", h)
		}
		sts.set(func(s *fakeSTS) { s.err = &Error{Kind: Throttled, Code: "Throttling"} })
		time.Sleep(time.Hour)
		if h := reports(); h["old throttled"] == 0 {
			t.Errorf("after the expiration: reported %v", h)
		}
	})
}

// TestFailedRenewalIsNotReportedWhileValid tries each kind of error that may be temporary.
func TestFailedRenewalIsNotReportedWhileValid(t *testing.T) {
	for _, kind := range []Kind{Throttled, Unavailable, NodeCredentials, ClockSkew} {
		synctest.Test(t, func(t *testing.T) {
			var reported atomic.Int64
			sts := new(fakeSTS)
			c := running(t, sts, Config{Failed: func(string, roles.Assumption, *Error) { reported.Add(1) }})
			c.Hold("pod", assumption("reader"))
			synctest.Wait()
			calls := sts.count()
			sts.set(func(s *fakeSTS) { s.err = &Error{Kind: kind} })
			time.Sleep(59 * time.Minute)
			if reported.Load() > 0 || sts.count() == calls {
				t.Errorf("%s: reported %d times after %d calls", kind, reported.Load(), sts.count()-calls)
			}
			time.Sleep(time.Hour)
			if reported.Load() == 0 {
				t.Errorf("%s: not reported after the credentials expired", kind)
			}
		})
	}
}

func TestFailureIsReportedToEachHolder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reported := map[string]int{}
		c := running(t, &fakeSTS{latency: time.Second, err: &Error{Kind: Malformed, Code: "ValidationError"}}, Config{Failed: func(holder string, a roles.Assumption, err *Error) {
			if a == assumption("bad") && err.Code == "ValidationError" {
				reported[holder]++
			}
		}})
		c.Hold("one", assumption("bad"))
		c.Hold("two", assumption("bad"))
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if reported["one"] != 1 || reported["two"] != 1 || len(reported) != 2 {
			t.Errorf("reported %v", reported)
		}
	})
}
