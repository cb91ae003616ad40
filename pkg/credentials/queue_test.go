package credentials

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// TestForgottenPodsLeaveNothing lets pods come and go while no background token is available.
func TestForgottenPodsLeaveNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := new(fakeSTS)
		c := running(t, sts, Config{})
		withoutBackgroundTokens(c)
		for i := range 100 {
			c.Hold(fmt.Sprint(i), assumption(fmt.Sprint(i)))
		}
		synctest.Wait()
		for i := range 100 {
			c.Forget(fmt.Sprint(i))
		}
		synctest.Wait()
		if c.limiter.firstCalls != 0 || c.backgroundCalls != 0 || len(c.background) != 0 || sts.count() != 100 {
			t.Errorf("%d tokens, %d running and %d queued calls, %d calls", c.limiter.firstCalls, c.backgroundCalls, len(c.background), sts.count())
		}
	})
}

func TestWaitingClientIsServedAfterHolderLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := running(t, new(fakeSTS), Config{})
		c.Hold("pod", assumption("former")) // takes the token of a new holder
		synctest.Wait()
		withoutTokens(c, 20)
		c.Hold("pod", assumption("a"))
		var wg sync.WaitGroup
		wg.Go(func() { mustGet(t, c, assumption("a")) })
		synctest.Wait()
		c.Forget("pod")
		wg.Wait()
	})
}

func TestRequestTakesFlightOutOfBackgroundQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := running(t, new(fakeSTS), Config{})
		for i := range maxBackgroundCalls {
			c.Hold(fmt.Sprint(i), assumption(fmt.Sprint("former-", i))) // takes the token of a new holder
		}
		synctest.Wait()
		withoutBackgroundTokens(c)
		for i := range maxBackgroundCalls {
			c.Hold(fmt.Sprint(i), assumption(fmt.Sprint(i)))
		}
		synctest.Wait()
		if len(c.background) != maxBackgroundCalls {
			t.Fatalf("%d queued", len(c.background))
		}
		for i := range maxBackgroundCalls {
			mustGet(t, c, assumption(fmt.Sprint(i)))
		}
		synctest.Wait()
		if c.backgroundCalls != 0 || len(c.background) != 0 {
			t.Errorf("%d calls run and %d are queued", c.backgroundCalls, len(c.background))
		}
	})
}

// withoutTokens takes all tokens, and as many foreground tokens as owed in advance.
func withoutTokens(c *Cache, owed int) {
	withoutBackgroundTokens(c)
	c.mu.Lock()
	defer c.mu.Unlock()
	for range foregroundBurst + owed {
		c.limiter.foreground.ReserveN(time.Now(), 1)
	}
}

// withoutBackgroundTokens takes the background tokens of more than an hour in advance.
func withoutBackgroundTokens(c *Cache) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for range 1000 {
		c.limiter.background.ReserveN(time.Now(), 1)
	}
}

// TestSupersededRequestIsAnsweredAtOnce requests another role while the first request is queued.
func TestSupersededRequestIsAnsweredAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := new(fakeSTS)
		c := running(t, sts, Config{})
		withoutTokens(c, 10)
		began := time.Now()
		answered := make(chan error, 1)
		go func() {
			_, err := c.Get(t.Context(), "pod", assumption("old"))
			answered <- err
		}()
		synctest.Wait()
		go c.Get(t.Context(), "pod", assumption("new"))
		err := <-answered
		if err != errSuperseded || time.Since(began) > 0 {
			t.Errorf("%v after %v", err, time.Since(began))
		}
		// The error blames neither STS nor the role: the session name or the external ID may have
		// changed.
		if text := fmt.Sprint(err); !strings.Contains(text, "the pod's annotations changed before STS was asked") || strings.HasPrefix(text, "sts:") {
			t.Error(text)
		}
		time.Sleep(10 * time.Second)
		if n := sts.count(); n != 1 || !has(c, assumption("new")) || c.Stats().Entries != 1 {
			t.Errorf("%d calls, %d entries", n, c.Stats().Entries)
		}
	})
}

// TestSharedAssumptionIsServedToAllWaitingPods has a flooding pod request the same assumption as
// its neighbour.
func TestSharedAssumptionIsServedToAllWaitingPods(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := new(fakeSTS)
		c := running(t, sts, Config{})
		for i := range podBurst {
			mustGetFor(t, c, "flood", assumption(fmt.Sprint(i)))
		}
		shared, began := assumption("shared"), time.Now()
		flood := make(chan error, 1)
		go func() {
			_, err := c.Get(t.Context(), "flood", shared)
			flood <- err
		}()
		synctest.Wait()
		mustGetFor(t, c, "neighbour", shared)
		if err := <-flood; err != nil || time.Since(began) > 0 {
			t.Errorf("%v after %v", err, time.Since(began))
		}
		// A call for the flooding pod alone waits for the pod's own token.
		mustGetFor(t, c, "flood", assumption("more"))
		if waited := time.Since(began); waited < 4*time.Second || waited > 6*time.Second || sts.count() != podBurst+2 {
			t.Errorf("%v, %d calls", waited, sts.count())
		}
	})
}

// TestSupersededRequestKeepsSharedFlight lets two pods wait for one flight. Then one of them
// requests another role.
func TestSupersededRequestKeepsSharedFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := running(t, new(fakeSTS), Config{})
		withoutTokens(c, 10)
		shared := assumption("shared")
		neighbour := make(chan error, 1)
		go c.Get(t.Context(), "pod", shared)
		go func() {
			_, err := c.Get(t.Context(), "neighbour", shared)
			neighbour <- err
		}()
		synctest.Wait()
		go c.Get(t.Context(), "pod", assumption("other"))
		if err := <-neighbour; err != nil {
			t.Error(err)
		}
	})
}

// TestUnusedFlightsLeaveQueue checks when a queued flight leaves the queue without a call.
func TestUnusedFlightsLeaveQueue(t *testing.T) {
	a := assumption("a")
	for name, tt := range map[string]struct {
		leave func(c *Cache, hangUp context.CancelFunc)
		calls int
	}{
		"its client hangs up":                           {func(c *Cache, hangUp context.CancelFunc) { hangUp() }, 0},
		"its client hangs up, a pod holds it":           {func(c *Cache, hangUp context.CancelFunc) { c.Hold("pod", a); hangUp() }, 1},
		"its pod releases it, then its client hangs up": {func(c *Cache, hangUp context.CancelFunc) { c.Hold("pod", a); c.Release("pod"); hangUp() }, 0},
		"its pod is gone, its client waits":             {func(c *Cache, hangUp context.CancelFunc) { c.Hold("pod", a); c.Forget("pod") }, 1},
		"its client hangs up, then its pod releases it": {func(c *Cache, hangUp context.CancelFunc) {
			c.Hold("pod", a)
			hangUp()
			synctest.Wait()
			c.Release("pod")
		}, 0},
		"its pod requests another and holds it": {func(c *Cache, hangUp context.CancelFunc) {
			c.Hold("pod", a)
			hangUp()
			synctest.Wait()
			ctx, cancel := context.WithCancel(context.Background())
			cancel()
			c.Get(ctx, "pod", assumption("other"))
		}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				sts := new(fakeSTS)
				c := running(t, sts, Config{})
				c.Hold("pod", assumption("former")) // takes the token of a new holder
				synctest.Wait()
				c.Release("pod")
				withoutTokens(c, 10)
				ctx, hangUp := context.WithCancel(t.Context())
				defer hangUp()
				go c.Get(ctx, "pod", a)
				synctest.Wait()
				tt.leave(c, hangUp)
				synctest.Wait()
				if n := c.Stats().Entries; n != tt.calls {
					t.Errorf("%d entries", n)
				}
				time.Sleep(3 * time.Hour)
				sts.mu.Lock()
				n := sts.calls[a]
				sts.mu.Unlock()
				if min(n, 1) != tt.calls {
					t.Errorf("%d calls", n)
				}
				hangUp()
				c.Forget("pod")
				time.Sleep(5 * time.Minute)
				synctest.Wait() // a sweep may be due now
				if c.Stats().Entries != 0 || len(c.requesters) != 0 || len(c.roundRobin) != 0 || len(c.background) != 0 {
					t.Errorf("left: %+v", c.queue)
				}
			})
		})
	}
}

func TestQueuedFlightsUseNoGoroutines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := running(t, &fakeSTS{latency: time.Second}, Config{})
		before := runtime.NumGoroutine()
		for i := range 500 {
			c.Hold(fmt.Sprint(i), assumption(fmt.Sprint(i)))
		}
		synctest.Wait()
		if n := runtime.NumGoroutine() - before; n > maxBackgroundCalls {
			t.Errorf("%d goroutines", n)
		}
	})
}

// TestDelayShrinksAsRateRecovers waits for a token after throttling and failures. The rate rises
// during the wait, so the token is available earlier than the rate at the request predicts.
func TestDelayShrinksAsRateRecovers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := running(t, new(fakeSTS), Config{})
		withoutTokens(c, 0)
		began := time.Now()
		c.mu.Lock()
		for range 20 {
			c.limiter.Observe(began, &Error{Kind: Throttled})
			c.limiter.Observe(began, &Error{Kind: Unavailable})
		}
		seems := c.limiter.Take(began, true)
		c.mu.Unlock()
		mustGetFor(t, c, "pod", assumption("a"))
		if waited := time.Since(began); seems < 3*time.Minute || waited > 55*time.Second {
			t.Errorf("waited %v; predicted %v", waited, seems)
		}
	})
}

func TestCloseAnswersQueuedRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCache(new(fakeSTS), Config{Log: discard})
		withoutTokens(c, 1000)
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Second, cancel)
		answered := make(chan error, 1)
		go func() {
			_, err := c.Get(t.Context(), "pod", assumption("a"))
			answered <- err
		}()
		if err := c.Run(ctx); err != nil {
			t.Error(err)
		}
		began := time.Now()
		if err := <-answered; !errors.Is(err, ErrClosed) || time.Since(began) > 0 {
			t.Errorf("%v after %v", err, time.Since(began))
		}
	})
}

// TestCallWithoutUsersLeavesNoEntry releases an assumption during its call, after the client has
// closed its connection.
func TestCallWithoutUsersLeavesNoEntry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := running(t, &fakeSTS{latency: time.Second}, Config{})
		c.Hold("pod", assumption("a"))
		ctx, hangUp := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer hangUp()
		if d, err := c.Get(ctx, "pod", assumption("a")); err == nil {
			t.Fatal(d)
		}
		c.Release("pod")
		time.Sleep(time.Second)
		if n := c.Stats().Entries; n != 0 {
			t.Errorf("%d entries", n)
		}
	})
}
