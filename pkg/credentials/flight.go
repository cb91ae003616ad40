package credentials

import (
	"context"
	"sync"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
)

const (
	// background is how many flights may be in the air that nobody waits for, of those that renew credentials and of the others each.
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
	slots  chan struct{} // those of its kind
}

// launch is the flight in the air or a new one; nil once the cache is closed. The mutex is held.
func (c *Cache) launch(a roles.Assumption, e *entry) *flight {
	if e.flight != nil || c.closed {
		return e.flight
	}
	f := &flight{done: make(chan struct{}), urgent: make(chan struct{}), left: make(chan struct{}), queued: true, slots: c.ahead}
	if e.document != nil {
		f.slots = c.renew
	}
	e.flight = f
	c.flying.Go(func() { c.fly(a, e, f) })
	return f
}

func (c *Cache) fly(a roles.Assumption, e *entry, f *flight) {
	failure, concerned := c.call(a, e, f)
	close(f.done)
	for _, holder := range concerned { // which may take a while, and nobody waits for it
		c.failure(holder, a, failure)
	}
}

// call is all of a flight but the telling.
func (c *Cache) call(a roles.Assumption, e *entry, f *flight) (failure *Error, concerned []string) {
	ticket, release := c.admit(f)
	defer release()
	if !c.takeOff(f) {
		ticket.GiveBack()
		return nil, nil
	}
	ctx, cancel := context.WithTimeout(c.life, flightTime)
	defer cancel()
	start := time.Now()
	creds, err := c.sts.AssumeRole(ctx, a)
	now := time.Now()
	if err == nil && !creds.Expiration.After(now) {
		err = &Error{Kind: ClockSkew, Code: "ExpiredCredentials", Cause: "by the node's clock, the credentials that STS gave have already ended"}
	}
	failure = asError(err)
	c.observer.Assumed(outcome(failure), now.Sub(start))
	c.pace.Told(now, failure)
	return failure, c.settle(a, e, creds, failure, now)
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

// admit waits until a flight may start, or is no longer wanted: one that nobody waits for has a slot among the few of its kind, and each
// has its token. What it returns is to be called at its end.
func (c *Cache) admit(f *flight) (t Ticket, release func()) {
	select {
	case f.slots <- struct{}{}:
		if t, ok := c.queue(false, f.urgent, f.left); ok {
			return t, func() { <-f.slots }
		}
		<-f.slots
	case <-f.urgent:
	case <-f.left:
	case <-c.life.Done():
	}
	t, _ = c.queue(true, nil, f.left)
	return t, func() {}
}

// queue waits for a token of its kind. It is false where the flight became urgent before: then the token is another's. It does not wait
// for one that is no longer wanted.
func (c *Cache) queue(waiting bool, urgent, left <-chan struct{}) (t Ticket, ok bool) {
	t = c.pace.Take(time.Now(), waiting)
	for {
		wait := t.Wait(time.Now())
		if wait <= 0 {
			return t, true
		}
		timer := time.NewTimer(min(wait, time.Second)) // how fast the queue moves changes
		select {
		case <-timer.C:
			continue
		case <-urgent:
			t.GiveBack()
		case <-left:
			ok = true
		case <-c.life.Done():
			ok = true
		}
		timer.Stop()
		return t, ok
	}
}
