package credentials

import (
	"context"
	"maps"
	"sync"
	"time"
)

// Run calls STS for clients, prefetches and renews held credentials, and removes unused ones. When
// ctx ends, it cancels the running calls, waits for them to end and returns nil.
func (c *Cache) Run(ctx context.Context) error {
	var flights sync.WaitGroup
	defer flights.Wait()
	defer close(c.ended)
	for {
		calls, next := c.sweep(time.Now())
		for _, f := range calls {
			flights.Go(func() { c.assumeRole(ctx, f) })
		}
		select {
		case <-ctx.Done():
			return nil
		case <-c.wake:
		case <-time.After(next):
		}
	}
}

// wakeUp makes Run sweep.
func (c *Cache) wakeUp() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// sweep queues due renewals and removes unused entries. It returns the flights whose calls start
// now, and how long to wait until the next sweep.
func (c *Cache) sweep(now time.Time) (calls []*flight, next time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	next = idleLifetime
	for a, e := range c.entries {
		switch {
		case e.holders > 0 && e.renewAt.After(now):
			next = min(next, e.renewAt.Sub(now))
		case e.holders > 0:
			if f := c.flightFor(a, e); f.queued && !f.inBackground {
				f.inBackground = true
				c.background = append(c.background, f)
			}
		case e.flight == nil && !now.Before(e.idleUntil) && !now.Before(e.errUntil):
			delete(c.entries, a)
		}
	}
	// A requester with a full bucket and without a flight or a call is the same as a new one.
	maps.DeleteFunc(c.requesters, func(_ string, r *requester) bool {
		return r.flight == nil && !r.calling && r.calls.TokensAt(now) >= podBurst
	})
	for {
		f, wait := c.next(now)
		if f == nil {
			return calls, min(next, wait)
		}
		c.dequeue(f)
		calls = append(calls, f)
	}
}
