package credentials

import (
	"context"
	"sync"
	"time"
)

// Run calls STS for clients, prefetches and renews held credentials, and removes unused ones until ctx
// ends. It then cancels the calls and waits for them.
func (c *Cache) Run(ctx context.Context) error {
	var flights sync.WaitGroup
	defer flights.Wait()
	defer close(c.ended)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-c.wake:
		case <-timer.C:
		}
		calls, next := c.sweep(time.Now())
		for _, f := range calls {
			flights.Go(func() { c.fly(ctx, f) })
		}
		timer.Reset(next)
	}
}

// wakeUp makes Run sweep.
func (c *Cache) wakeUp() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// sweep queues due renewals and removes unused entries. It returns the flights whose calls start now, and
// how long to wait until the next sweep.
func (c *Cache) sweep(now time.Time) (calls []*flight, next time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	next = idleLifetime
	for a, e := range c.entries {
		isDue := !now.Before(e.renewAt)
		switch {
		case e.holders > 0 && isDue:
			c.requestBackground(c.launch(a, e))
		case e.holders > 0:
			next = min(next, e.renewAt.Sub(now))
		case e.flight == nil && !now.Before(e.idleUntil) && !now.Before(e.errUntil):
			delete(c.entries, a)
		}
	}
	c.removeIdleRequesters(now)
	calls, wait := c.dispatch(now)
	if len(c.roundRobin)+len(c.background) > 0 {
		next = min(next, wait)
	}
	return calls, next
}
