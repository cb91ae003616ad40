package credentials

import (
	"context"
	"sync"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
)

const (
	// background is how many flights may be in the air that nobody waits for.
	background = 8
	// flightTime bounds one flight.
	flightTime = 15 * time.Second
)

// flight is one call to STS. done is closed after the entry has the outcome.
type flight struct {
	done   chan struct{}
	urgent chan struct{} // closed when somebody waits: the flight does not queue for a slot then
	hurry  sync.Once
	left   chan struct{} // closed when everybody left while it queued and nobody ever asked: it does not ask STS then
	queued bool          // guarded by the cache's mutex
}

// launch is the flight in the air or a new one; nil once the cache is closed. The mutex is held.
func (c *Cache) launch(a roles.Assumption, e *entry) *flight {
	if e.flight != nil || c.closed {
		return e.flight
	}
	f := &flight{done: make(chan struct{}), urgent: make(chan struct{}), left: make(chan struct{}), queued: true}
	e.flight = f
	c.flying.Go(func() { c.fly(a, e, f) })
	return f
}

func (c *Cache) fly(a roles.Assumption, e *entry, f *flight) {
	defer close(f.done)
	release := c.admit(f)
	defer release()
	if !c.takeOff(f) {
		return
	}
	ctx, cancel := context.WithTimeout(c.life, flightTime)
	defer cancel()
	start := time.Now()
	creds, err := c.sts.AssumeRole(ctx, a)
	now := time.Now()
	if err == nil && !creds.Expiration.After(now) {
		err = &Error{Kind: Unavailable, Code: "ExpiredCredentials", Message: "STS answered with credentials that have ended; is this node's clock right?"}
	}
	failure := asError(err)
	c.observer.Assumed(outcome(failure), now.Sub(start))
	c.pace.Told(now, failure)
	for _, holder := range c.settle(a, e, creds, failure, now) {
		c.failure(holder, a, failure)
	}
}

// takeOff ends a flight's queueing, and tells whether anybody still wants it.
func (c *Cache) takeOff(f *flight) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	f.queued = false
	select {
	case <-f.left:
		return false
	default:
		return true
	}
}

// admit waits until a flight may start: one that nobody waits for has a slot among the few of its kind, and each has its token. What
// it returns is to be called at its end.
func (c *Cache) admit(f *flight) (release func()) {
	release = func() {}
	select {
	case c.slots <- struct{}{}:
		release = func() { <-c.slots }
	case <-f.urgent:
	case <-f.left:
		return release
	case <-c.life.Done():
	}
	select {
	case <-f.urgent:
	default:
		if c.queue(false, f) {
			return release
		}
	}
	c.queue(true, nil)
	return release
}

// queue waits for a token of its kind. It is false where the flight became urgent before, and the token is another's. It gives its token
// back, too, where nobody wants the flight any more.
func (c *Cache) queue(waiting bool, f *flight) bool {
	var urgent, left <-chan struct{}
	if f != nil {
		urgent, left = f.urgent, f.left
	}
	ticket := c.pace.Take(time.Now(), waiting)
	for {
		wait := ticket.Wait(time.Now())
		if wait <= 0 {
			return true
		}
		// How fast the queue moves changes.
		timer := time.NewTimer(min(wait, time.Second))
		select {
		case <-urgent:
			timer.Stop()
			ticket.GiveBack()
			return false
		case <-left:
			timer.Stop()
			ticket.GiveBack()
			return true // to where it is found out
		case <-c.life.Done():
			timer.Stop()
			return true
		case <-timer.C:
		}
	}
}
