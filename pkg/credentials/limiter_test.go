package credentials

import (
	"fmt"
	"maps"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
)

var epoch = time.Date(2026, 11, 25, 0, 0, 0, 0, time.UTC)

// calls is how many calls of a kind a pace admits in a time, where there is always another one to make.
func calls(p *Limiter, from time.Time, during time.Duration, waiting bool) (n int) {
	for now := from; now.Sub(from) < during; {
		wait := p.Take(now, waiting)
		if wait <= 0 {
			n++
		}
		now = now.Add(min(wait, time.Second))
	}
	return n
}

func TestBackgroundRateFollowsHolders(t *testing.T) {
	for name, tt := range map[string]struct {
		pods    int
		session time.Duration
		hourly  int // least calls an hour that a steady state needs
	}{
		"an hour":         {110, time.Hour, 240},
		"a quarter":       {110, 15 * time.Minute, 960},
		"twelve hours":    {110, 12 * time.Hour, 10},
		"nobody":          {0, time.Hour, 0},
		"a handful":       {5, time.Hour, 11},
		"as many as many": {1000, time.Hour, 2181},
	} {
		t.Run(name, func(t *testing.T) {
			p := NewLimiter(epoch)
			for range tt.pods {
				p.AddHolder(tt.session, true)
			}
			// Each pod brings the token for its first call.
			if n := calls(p, epoch, time.Millisecond, false); n != tt.pods+backgroundBurst {
				t.Errorf("%d calls at once for %d pods", n, tt.pods)
			}
			n := calls(p, epoch.Add(time.Millisecond), time.Hour, false)
			least, most := 2*tt.hourly, max(4*tt.hourly, 3600*2/10)
			if n < least || n > most {
				t.Errorf("%d calls in an hour, want %d to %d", n, least, most)
			}
		})
	}
}

func TestForegroundHasItsOwnBucket(t *testing.T) {
	p := NewLimiter(epoch)
	for range 500 {
		p.Take(epoch, false)
	}
	for i := range foregroundBurst {
		if wait := p.Take(epoch, true); wait > 0 {
			t.Fatalf("the %dth waits %v behind renewals", i, wait)
		}
	}
	if wait := p.Take(epoch, true); wait <= 0 || wait > 150*time.Millisecond {
		t.Errorf("one too many waits %v", wait)
	}
}

// TestRequestsDoNotWaitBehindPrefetches has all tokens of the others be taken.
func TestRequestsDoNotWaitBehindPrefetches(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := running(t, new(fakeSTS), Config{})
		withoutBackgroundTokens(c)
		c.Hold("neighbour", assumption("neighbour's")) // takes its own token
		synctest.Wait()
		c.Hold("neighbour", assumption("a")) // an existing holder has none
		time.Sleep(10 * time.Second)
		if has(c, assumption("a")) {
			t.Fatal("there were tokens left")
		}
		start := time.Now()
		mustGet(t, c, assumption("a"))
		mustGet(t, c, assumption("b"))
		if waited := time.Since(start); waited > 0 {
			t.Errorf("it waited %v", waited)
		}
	})
}

func TestRateDropsAndRecovers(t *testing.T) {
	p := NewLimiter(epoch)
	calls(p, epoch, time.Millisecond, true)
	now := epoch.Add(time.Millisecond)
	during := func(d time.Duration) int {
		n := calls(p, now, d, true)
		now = now.Add(d)
		return n
	}
	if n := during(10 * time.Second); n < 95 || n > 105 {
		t.Fatalf("%d calls in ten seconds", n)
	}
	p.Observe(now, &Error{Kind: Denied})
	p.Observe(now, &Error{Kind: NodeCredentials})
	if n := during(10 * time.Second); n < 95 {
		t.Errorf("slowed down to %d by denials", n)
	}
	for range 20 {
		p.Observe(now, &Error{Kind: Unavailable})
	}
	if n := during(10 * time.Second); n < 5 || n > 8 {
		t.Errorf("%d calls in the ten seconds after an outage", n)
	}
	for range 20 {
		p.Observe(now, &Error{Kind: Throttled})
	}
	if n := during(10 * time.Second); n > 1 {
		t.Errorf("%d calls in the ten seconds after throttling", n)
	}
	if n := during(4 * time.Minute); n < 300 || n > 900 {
		t.Errorf("%d calls in the four minutes after that", n)
	}
	if n := during(10 * time.Second); n < 95 || n > 105 {
		t.Errorf("%d calls in ten seconds in the end", n)
	}
}

// TestFailuresDoNotLowerBackgroundRate has STS fail all the time: where it fails half of the calls, there must be twice as many.
func TestFailuresDoNotLowerBackgroundRate(t *testing.T) {
	p := NewLimiter(epoch)
	for range 110 {
		p.AddHolder(time.Hour, false)
	}
	calls(p, epoch, time.Millisecond, false)
	now := epoch.Add(time.Millisecond)
	for range 20 {
		p.Observe(now, &Error{Kind: Unavailable})
	}
	if n := calls(p, now, time.Hour, false); n < 480 {
		t.Errorf("%d calls in an hour, of which 240 have to succeed", n)
	}
}

func TestRemoveHolder(t *testing.T) {
	p := NewLimiter(epoch)
	for range 1000 {
		p.AddHolder(time.Hour, false)
	}
	for range 1000 {
		p.RemoveHolder(time.Hour)
	}
	p.AddHolder(time.Hour, false)
	p.RemoveHolder(time.Hour)
	if n := calls(p, epoch, time.Hour, false); n > 3600*minRate+backgroundBurst {
		t.Errorf("%d calls in an hour for nobody", n)
	}
}

// TestRequestsGoFirstAfterThrottling has STS throttle a node that just started: once it answers again, those who wait are served
// before what is only fetched ahead.
func TestRequestsGoFirstAfterThrottling(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := &fakeSTS{err: &Error{Kind: Throttled, Code: "Throttling"}, latency: 100 * time.Millisecond}
		c := running(t, sts, Config{})
		for i := range 110 {
			c.Hold(fmt.Sprint(i), assumption(fmt.Sprint(i)))
		}
		time.Sleep(5 * time.Minute)
		if n := sts.count(); n > 250 {
			t.Errorf("%d calls in five minutes of throttling", n)
		}
		sts.set(func(s *fakeSTS) { s.err = nil })
		start, before := time.Now(), sts.count()
		mustGet(t, c, assumption("waits"))
		if waited, others := time.Since(start), sts.count()-before-1; waited > time.Minute || others > 8 {
			t.Errorf("who waits waited %v behind %d others", waited, others)
		}
		time.Sleep(20 * time.Minute)
		for i := range 110 {
			if !has(c, assumption(fmt.Sprint(i))) {
				t.Fatal("twenty minutes later not all are fetched")
			}
		}
	})
}

// TestThrottledRenewalIsNotReported has renewals be throttled, and then a pod without credentials.
func TestThrottledRenewalIsNotReported(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		told := map[string]int{}
		sts := new(fakeSTS)
		c := running(t, sts, Config{Failed: func(holder string, _ roles.Assumption, err *Error) {
			mu.Lock()
			defer mu.Unlock()
			told[holder+" "+string(err.Kind)]++
		}})
		heard := func() map[string]int {
			mu.Lock()
			defer mu.Unlock()
			return maps.Clone(told)
		}
		c.Hold("old", assumption("old"))
		synctest.Wait()
		sts.set(func(s *fakeSTS) { s.err = &Error{Kind: Throttled, Code: "Throttling"} })
		c.Hold("new", assumption("new"))
		time.Sleep(50 * time.Minute)
		if h := heard(); sts.count() < 3 || h["new throttled"] == 0 || len(h) != 1 {
			t.Errorf("told %v", h)
		}
		sts.set(func(s *fakeSTS) { s.err = &Error{Kind: Denied, Code: "AccessDenied"} })
		time.Sleep(5 * time.Minute)
		if h := heard(); h["old denied"] == 0 {
			t.Errorf("of a denial told %v", h)
		}
		sts.set(func(s *fakeSTS) { s.err = &Error{Kind: Throttled, Code: "Throttling"} })
		time.Sleep(time.Hour)
		if h := heard(); h["old throttled"] == 0 {
			t.Errorf("after its end told %v", h)
		}
	})
}

// TestFailedRenewalIsNotReportedWhileValid holds for all that may pass by itself.
func TestFailedRenewalIsNotReportedWhileValid(t *testing.T) {
	for _, kind := range []Kind{Throttled, Unavailable, NodeCredentials, ClockSkew} {
		synctest.Test(t, func(t *testing.T) {
			var told atomic.Int64
			sts := new(fakeSTS)
			c := running(t, sts, Config{Failed: func(string, roles.Assumption, *Error) { told.Add(1) }})
			c.Hold("pod", assumption("reader"))
			synctest.Wait()
			calls := sts.count()
			sts.set(func(s *fakeSTS) { s.err = &Error{Kind: kind} })
			time.Sleep(59 * time.Minute)
			if told.Load() > 0 || sts.count() == calls {
				t.Errorf("%s: told %d times after %d calls", kind, told.Load(), sts.count()-calls)
			}
			time.Sleep(time.Hour)
			if told.Load() == 0 {
				t.Errorf("%s: not told of after the credentials ended", kind)
			}
		})
	}
}

func TestFailureIsReportedToEachHolder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		told := map[string]int{}
		c := running(t, &fakeSTS{latency: time.Second, err: &Error{Kind: Malformed, Code: "ValidationError"}}, Config{Failed: func(holder string, a roles.Assumption, err *Error) {
			if a == assumption("bad") && err.Code == "ValidationError" {
				told[holder]++
			}
		}})
		c.Hold("one", assumption("bad"))
		c.Hold("two", assumption("bad"))
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if told["one"] != 1 || told["two"] != 1 || len(told) != 2 {
			t.Errorf("told %v", told)
		}
	})
}
