package credentials

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"
)

// TestFastChangesCauseFewCalls changes the held assumption faster than STS answers.
func TestFastChangesCauseFewCalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := &fakeSTS{latency: time.Second}
		c := running(t, sts, Config{})
		for i := range 1000 {
			c.Hold("pod", assumption(fmt.Sprint("role-", i)))
		}
		c.Hold("neighbour", assumption("other"))
		time.Sleep(3 * time.Second)
		if !has(c, assumption("other")) {
			t.Error("the neighbour waits behind unused calls")
		}
		if n := sts.count(); n > 2*maxBackgroundCalls+2 {
			t.Errorf("%d calls for two pods", n)
		}
		c.mu.Lock()
		entries := len(c.entries)
		c.mu.Unlock()
		if entries > 2 {
			t.Errorf("%d entries for two pods", entries)
		}
	})
}

// TestSlowChangesCauseFewCalls changes more slowly than STS answers, so each change could cause a
// call.
func TestSlowChangesCauseFewCalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := new(fakeSTS)
		c := running(t, sts, Config{})
		const times = 3600
		for i := range times {
			if i%2 == 0 {
				c.Hold("pod", assumption(fmt.Sprint("role-", i)))
			} else {
				c.Release("pod") // its annotation is malformed in between
			}
			time.Sleep(time.Second)
		}
		if n := sts.count(); n > 2*times/int(changeInterval.Seconds())+2 {
			t.Errorf("%d calls in an hour for one pod", n)
		}
		c.Hold("pod", assumption("last"))
		time.Sleep(changeInterval + time.Second)
		if !has(c, assumption("last")) {
			t.Error("the last assumption is not prefetched")
		}
	})
}

// TestRequestAfterChangeIsServedAtOnce requests assumptions that are not prefetched yet.
func TestRequestAfterChangeIsServedAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := running(t, new(fakeSTS), Config{})
		start := time.Now()
		for i := range 20 {
			a := assumption(fmt.Sprint(i))
			c.Hold("pod", a)
			mustGetFor(t, c, "pod", a)
		}
		if waited := time.Since(start); waited > 0 {
			t.Errorf("a request waited %v", waited)
		}
	})
}

// TestChangesAddNoTokens checks that the changes of pods do not escape the lowered rate of a
// throttled node.
func TestChangesAddNoTokens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := &fakeSTS{err: &Error{Kind: Throttled, Code: "Throttling"}}
		c := running(t, sts, Config{})
		for minute := range 60 {
			for pod := range 50 {
				c.Hold(fmt.Sprint("pod-", pod), assumption(fmt.Sprint("role-", minute, "-", pod)))
			}
			time.Sleep(time.Minute)
		}
		if n := sts.count(); n > 400 {
			t.Errorf("%d calls in an hour of throttling", n)
		}
	})
}

// TestForget releases the assumption of a pod, then forgets the pod.
func TestForget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := running(t, new(fakeSTS), Config{})
		c.Hold("pod", assumption("a"))
		synctest.Wait()
		c.Release("pod")
		if has(c, assumption("a")) || c.Stats().Holders != 1 {
			t.Errorf("%d holders after Release", c.Stats().Holders)
		}
		c.Forget("pod")
		c.Forget("pod")
		c.Release("pod")
		if c.Stats().Holders != 0 {
			t.Errorf("%d holders", c.Stats().Holders)
		}
	})
}

// TestHoldUsesCachedError holds an assumption that STS has just refused.
func TestHoldUsesCachedError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := &fakeSTS{err: &Error{Kind: Denied, Code: "AccessDenied"}}
		c := running(t, sts, Config{})
		a := assumption("a")
		if _, err := c.Get(t.Context(), "pod", a); err == nil {
			t.Fatal("credentials")
		}
		c.Hold("pod", a)
		time.Sleep(29 * time.Second)
		if n := sts.count(); n != 1 {
			t.Errorf("%d calls", n)
		}
		sts.set(func(s *fakeSTS) { s.err = nil })
		time.Sleep(4 * time.Minute)
		if !has(c, a) {
			t.Error("never retried")
		}
	})
}

func TestThirdChangeIsPrefetchedAfterInterval(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := running(t, new(fakeSTS), Config{})
		c.Hold("pod", assumption("1"))
		c.Hold("pod", assumption("2"))
		synctest.Wait()
		c.Hold("pod", assumption("3"))
		time.Sleep(changeInterval + time.Second)
		if !has(c, assumption("3")) {
			t.Error("not prefetched in time")
		}
	})
}

func TestChangeToRefusedRoleDoesNotWaitForRetry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := &fakeSTS{err: &Error{Kind: Denied}}
		c := running(t, sts, Config{})
		if _, err := c.Get(t.Context(), "pod", assumption("a")); err == nil {
			t.Fatal("credentials")
		}
		time.Sleep(31 * time.Second) // the error is no longer cached; the retry is due after 90 seconds or more
		sts.set(func(s *fakeSTS) { s.err = nil })
		for _, role := range []string{"1", "2", "a"} {
			c.Hold("pod", assumption(role))
		}
		time.Sleep(changeInterval + time.Second)
		if !has(c, assumption("a")) {
			t.Error("not prefetched in time")
		}
	})
}

func TestForgottenHoldersNeedNoCalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := running(t, new(fakeSTS), Config{})
		for i := range 100 {
			c.Hold(fmt.Sprint(i), assumption(fmt.Sprint(i)))
		}
		synctest.Wait()
		for i := range 100 {
			c.Forget(fmt.Sprint(i))
		}
		if c.limiter.held != 0 || c.limiter.need > 1e-9 {
			t.Errorf("%d are held, which need %v calls a second", c.limiter.held, c.limiter.need)
		}
	})
}
