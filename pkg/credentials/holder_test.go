package credentials

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"
)

// TestFastChangesCauseFewCalls holds one assumption after the other, faster than STS answers.
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
			t.Error("the neighbour waits behind calls for nobody")
		}
		if n := sts.count(); n > 2*maxBackgroundCalls+2 {
			t.Errorf("STS was asked %d times for two pods", n)
		}
		c.mu.Lock()
		entries := len(c.entries)
		c.mu.Unlock()
		if entries > 2 {
			t.Errorf("%d entries for two pods", entries)
		}
	})
}

// TestSlowChangesCauseFewCalls changes more slowly than STS answers, so each of its wishes could be a call.
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
			t.Errorf("STS was asked %d times in an hour for one pod", n)
		}
		c.Hold("pod", assumption("last"))
		time.Sleep(changeInterval + time.Second)
		if !has(c, assumption("last")) {
			t.Error("what it holds in the end is not fetched ahead")
		}
	})
}

// TestRequestAfterChangeIsServedAtOnce has a pod ask for what is not fetched ahead for it yet.
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
			t.Errorf("it waited %v", waited)
		}
	})
}

// TestChangesAddNoTokens has STS throttle, which slows a node down: a pod's changes do not pass that.
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
			t.Errorf("STS was asked %d times in an hour of throttling", n)
		}
	})
}

// TestForget is what a pod that is gone leaves behind, and one that holds nothing for now.
func TestForget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := running(t, new(fakeSTS), Config{})
		c.Hold("pod", assumption("a"))
		synctest.Wait()
		c.Release("pod")
		if has(c, assumption("a")) || c.Stats().Holders != 1 {
			t.Errorf("%d holders after it let go", c.Stats().Holders)
		}
		c.Forget("pod")
		c.Forget("pod")
		c.Release("pod")
		if c.Stats().Holders != 0 {
			t.Errorf("%d holders", c.Stats().Holders)
		}
	})
}

// TestHoldUsesCachedError has a pod come that holds what STS has just refused.
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
			t.Errorf("STS was asked %d times", n)
		}
		sts.set(func(s *fakeSTS) { s.err = nil })
		time.Sleep(4 * time.Minute)
		if !has(c, a) {
			t.Error("it is never tried again")
		}
	})
}
