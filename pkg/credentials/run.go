package credentials

import (
	"context"
	"maps"
	"time"
)

// Run renews held credentials and removes unused ones until ctx ends. It then cancels the flights and
// waits for them.
func (c *Cache) Run(ctx context.Context) error {
	defer c.flights.Wait()
	defer c.cancelFlights()
	defer c.close()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-c.wake:
		case <-timer.C:
		}
		timer.Reset(time.Until(c.sweep(time.Now())))
	}
}

// wakeUp makes Run sweep.
func (c *Cache) wakeUp() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// close drops all queued flights and permits no new ones.
func (c *Cache) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	for _, e := range c.entries {
		if e.flight != nil && e.flight.queued {
			c.drop(e.flight)
		}
	}
}

// sweep queues due renewals, removes unused entries, starts the calls that may start, and returns when
// to sweep again.
func (c *Cache) sweep(now time.Time) time.Time {
	next := now.Add(idleLifetime)
	c.mu.Lock()
	defer c.mu.Unlock()
	for a, e := range c.entries {
		switch {
		case e.holders == 0:
			if e.flight == nil && !now.Before(e.idleUntil) && !now.Before(e.errUntil) {
				delete(c.entries, a)
			}
		case e.renewAt.IsZero():
		case !e.renewAt.After(now):
			c.enqueueBackground(c.launch(a, e))
		case e.renewAt.Before(next):
			next = e.renewAt
		}
	}
	maps.DeleteFunc(c.slowed, func(_ string, until time.Time) bool { return !now.Before(until) })
	c.removeIdleRequesters(now)
	if delay := c.dispatch(now); delay < next.Sub(now) {
		return now.Add(delay)
	}
	return next
}
