package credentials

import (
	"context"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
)

// flightTime bounds one call to STS.
const flightTime = 15 * time.Second

// flight is one call to STS, which waits in the queue first. The cache's mutex guards all but done.
type flight struct {
	assumption  roles.Assumption
	entry       *entry
	done        chan struct{} // closed when the entry has the outcome, or the flight left the queue without a call
	queued      bool          // the call has not started
	dropped     bool          // the flight left the queue without a call
	waiting     int           // clients
	backlog     *backlog      // the backlog that it waits in, or nil
	backlogSlot *backlog      // the backlog whose slot the call takes, or nil
	chargedTo   *requester    // the pod whose tokens paid for the call, or nil
}

// launch returns the entry's flight, or a new one that is queued; nil once the cache is closed. The mutex is held.
func (c *Cache) launch(a roles.Assumption, e *entry) *flight {
	if e.flight == nil && !c.closed {
		e.flight = &flight{assumption: a, entry: e, done: make(chan struct{}), queued: true}
	}
	return e.flight
}

// start makes the flight's call. The mutex is held.
func (c *Cache) start(f *flight) {
	c.dequeue(f)
	c.flying.Go(func() { c.fly(f) })
}

// drop ends a queued flight without a call. The mutex is held.
func (c *Cache) drop(f *flight) {
	c.dequeue(f)
	f.dropped = true
	e := f.entry
	e.flight = nil
	if e.holders == 0 && (e.keep.IsZero() || e.document == nil && e.err == nil) {
		delete(c.entries, f.assumption)
	}
	close(f.done)
}

// prune drops a queued flight that no client waits for and whose assumption no pod holds. The mutex is held.
func (c *Cache) prune(f *flight) {
	if f.queued && f.waiting == 0 && f.entry.holders == 0 {
		c.drop(f)
	}
}

func (c *Cache) fly(f *flight) {
	ctx, cancel := context.WithTimeout(c.life, flightTime)
	defer cancel()
	start := time.Now()
	creds, err := c.sts.AssumeRole(ctx, f.assumption)
	now := time.Now()
	if err == nil && !creds.Expiration.After(now) {
		err = &Error{Kind: ClockSkew, Code: "ExpiredCredentials", Cause: "by the node's clock, the credentials that STS issued have already ended"}
	}
	failure := asError(err)
	c.observer.Assumed(outcome(failure), now.Sub(start))
	holders := c.settle(f, creds, failure, now)
	close(f.done)
	for _, holder := range holders { // last, because it may take a while
		c.failure(holder, f.assumption, failure)
	}
}
