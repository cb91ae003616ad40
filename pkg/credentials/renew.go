package credentials

import (
	"context"
	"maps"
	"math/rand/v2"
	"time"
)

const (
	// safe is the shortest remaining lifetime that is handed out while STS answers: below it botocore and the Java SDK renew
	// on every call (botocore's window is 900 s and up to 600 s of jitter).
	safe = 1500 * time.Second
	// Credentials are renewed when 1,800 to 2,100 seconds remain: above safe, and spread so that the renewals of a fleet that
	// started together do not coincide.
	renewLeast, renewSpread = 1800 * time.Second, 300 * time.Second
	// full is the session length that these are for; shorter sessions scale them down.
	full = time.Hour
)

// Schedule decides when STS is called again. Its zero value is ready to use.
type Schedule struct {
	// ErrorTTL is how long requests are answered with an error before STS is called again; zero chooses by the kind of error.
	ErrorTTL time.Duration
	// Rand is the source of randomness; nil for math/rand/v2's own.
	Rand *rand.Rand
}

func (s Schedule) chance(n time.Duration) time.Duration {
	if s.Rand != nil {
		return time.Duration(s.Rand.Int64N(int64(n)))
	}
	return rand.N(n)
}

// jitter spreads a delay over its upper half, so that calls that failed together are not repeated together.
func (s Schedule) jitter(d time.Duration) time.Duration { return d/2 + s.chance(d/2+1) }

// Renewal returns when to renew credentials that end at end and have this lifetime, by STS's answer. left is the remaining lifetime
// of the credentials that they replace, negative if there were none.
//
// If the former credentials did not last, the first renewal comes at a random time before the usual one. Otherwise a fleet that
// fetched in one moment, because all of it started or STS came back, would renew in one moment for many hours.
func (s Schedule) Renewal(end time.Time, lifetime, left time.Duration) time.Time {
	due := end.Add(-scaled(renewLeast+s.chance(renewSpread), lifetime))
	// A minute later at the earliest: many pods do not live longer.
	if first := end.Add(scaled(time.Minute, lifetime) - lifetime); left < scaled(safe, lifetime) && due.After(first) {
		return first.Add(s.chance(due.Sub(first)))
	}
	return due
}

// scaled returns d for a session of an hour or more, and the same fraction of a shorter one.
func scaled(d, lifetime time.Duration) time.Duration {
	if lifetime >= full-time.Minute {
		return d
	}
	return time.Duration(float64(d) * float64(lifetime) / float64(full))
}

// Remember returns how long requests are answered with an error before STS is called again. A denial is remembered for longer
// than a temporary error, but not for long: IAM needs seconds to spread a change, and its author is waiting. Only a changed
// annotation corrects a malformed request, and that is another assumption.
func (s Schedule) Remember(k Kind, failures int) time.Duration {
	if s.ErrorTTL > 0 {
		return s.ErrorTTL
	}
	switch k {
	case Malformed:
		return 5 * time.Minute
	case Denied:
		return min(30*time.Second<<min(failures-1, 1), time.Minute)
	case Throttled:
		return s.jitter(min(2*time.Second<<min(failures-1, 5), time.Minute))
	}
	return s.jitter(min(500*time.Millisecond<<min(failures-1, 6), 30*time.Second))
}

// RetryAfter returns the delay before the next attempt in the background.
func (s Schedule) RetryAfter(k Kind, failures int) time.Duration {
	switch k {
	case Malformed:
		return 5*time.Minute + s.jitter(5*time.Minute)
	case Denied:
		return time.Minute + s.jitter(time.Minute)
	}
	return s.jitter(min(2*time.Second<<min(failures-1, 6), 2*time.Minute))
}

// Run renews the credentials of held assumptions and drops entries without use, until ctx ends. Then it ends the flights and
// waits for them.
func (c *Cache) Run(ctx context.Context) error {
	defer c.flying.Wait()
	defer c.end()
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

// close drops all queued flights and admits no other.
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

// sweep queues due renewals, drops entries without use, starts the calls that may start, and returns when to sweep again.
func (c *Cache) sweep(now time.Time) time.Time {
	next := now.Add(unheld)
	c.mu.Lock()
	defer c.mu.Unlock()
	for a, e := range c.entries {
		switch {
		case e.holders == 0:
			if e.flight == nil && !now.Before(e.keep) && !now.Before(e.errUntil) {
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
	c.forgetRequesters(now)
	if wait := c.dispatch(now); wait < next.Sub(now) {
		return now.Add(wait)
	}
	return next
}
