package credentials

import (
	"context"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
)

// flightTimeout bounds one call to STS.
const flightTimeout = 15 * time.Second

// flight is one call to STS, which first waits in the queue. The cache's mutex guards all but done.
type flight struct {
	assumption roles.Assumption
	entry      *entry
	done       chan struct{} // closed when the entry has the result, or the flight was dropped
	queued     bool          // the call has not started
	dropped    bool          // the flight left the queue without a call
	waiting    int           // clients
	backlog    *backlog      // the backlog that it waits in, or nil
	calledFrom *backlog      // the backlog that started the call, or nil
	requester  *requester    // the pod that started the call, or nil
}

// launch returns the entry's flight, or a new queued one; nil if the cache is closed. The mutex is held.
func (c *Cache) launch(a roles.Assumption, e *entry) *flight {
	if e.flight == nil && !c.closed {
		e.flight = &flight{assumption: a, entry: e, done: make(chan struct{}), queued: true}
	}
	return e.flight
}

// start makes the flight's call. The mutex is held.
func (c *Cache) start(f *flight) {
	c.dequeue(f)
	c.flights.Go(func() { c.fly(f) })
}

// dropUnused drops a queued flight that no client waits for and no pod holds. The mutex is held.
func (c *Cache) dropUnused(f *flight) {
	if f.queued && f.waiting == 0 && f.entry.holders == 0 {
		c.drop(f)
	}
}

// drop ends a queued flight without a call. The mutex is held.
func (c *Cache) drop(f *flight) {
	c.dequeue(f)
	f.dropped = true
	e := f.entry
	e.flight = nil
	if e.holders == 0 && (e.idleUntil.IsZero() || e.document == nil && e.err == nil) {
		delete(c.entries, f.assumption)
	}
	close(f.done)
}

// fly calls STS and stores the result.
func (c *Cache) fly(f *flight) {
	ctx, cancel := context.WithTimeout(c.flightContext, flightTimeout)
	defer cancel()
	start := time.Now()
	creds, err := c.sts.AssumeRole(ctx, f.assumption)
	now := time.Now()
	if err == nil && !creds.Expiration.After(now) {
		err = &Error{Kind: ClockSkew, Code: "ExpiredCredentials", Cause: "by the node's clock, the credentials that STS issued have already ended"}
	}
	failure := classify(err)
	outcome := "ok"
	if failure != nil {
		outcome = string(failure.Kind)
	}
	c.observer.Assumed(outcome, now.Sub(start))
	holders := c.finish(f, creds, failure, now)
	close(f.done)
	for _, holder := range holders { // last, because it may take a while
		c.failed(holder, f.assumption, failure)
	}
}

// finish stores the result in the flight's entry and returns the holders to notify of a failure.
func (c *Cache) finish(f *flight, creds *Credentials, failure *Error, now time.Time) (holders []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	a, e := f.assumption, f.entry
	e.flight = nil
	if f.calledFrom != nil {
		f.calledFrom.calls--
	}
	if f.requester != nil {
		f.requester.calling = false
	}
	if failure != nil {
		c.slowDown(e.pod, failure, now)
		c.storeError(a, e, failure, now)
		holders = c.holdersToNotify(a, e, failure, now)
	} else {
		c.store(a, e, creds, now)
	}
	if e.holders == 0 && e.idleUntil.IsZero() {
		delete(c.entries, a) // the last holder left during the call
	}
	c.wakeUp()
	return holders
}

// slowDown lowers the node's rate of calls after a failure, at most once in recovery for each pod.
// Otherwise a pod that changes its annotations all the time would keep the rate low for all pods: each
// change is a new assumption whose first call may fail. The mutex is held.
func (c *Cache) slowDown(pod string, failure *Error, now time.Time) {
	if failure.Kind != Throttled && failure.Kind != Unavailable || now.Before(c.slowed[pod]) {
		return
	}
	c.slowed[pod] = now.Add(recovery)
	c.limiter.Observe(now, failure)
}

// holdersToNotify returns the holders of the assumption. While their credentials are valid it returns
// them only if STS refuses the role; other failed renewals are repeated. The mutex is held.
func (c *Cache) holdersToNotify(a roles.Assumption, e *entry, failure *Error, now time.Time) (holders []string) {
	if failure.Kind != Denied && failure.Kind != Malformed && e.isValid(now) {
		return nil
	}
	for id, h := range c.holders {
		if h.holding && h.assumption == a {
			holders = append(holders, id)
		}
	}
	return holders
}

func (c *Cache) store(a roles.Assumption, e *entry, creds *Credentials, now time.Time) {
	e.err, e.errUntil, e.failures = nil, time.Time{}, 0
	lifetime := creds.Expiration.Sub(now)
	remaining := time.Duration(-1)
	if e.document != nil {
		remaining = e.document.expiration.Sub(now)
	}
	e.renewAt = c.schedule.Renewal(creds.Expiration, lifetime, remaining)
	// Credentials that expire earlier never replace those that expire later.
	if e.document == nil || creds.Expiration.After(e.document.expiration) {
		e.document, e.minRemaining = newDocument(creds), scaled(minRemaining, lifetime)
	}
	c.log.Debug("credentials obtained", "role", a.RoleARN, "session", a.SessionName, "expiration", creds.Expiration)
}

func (c *Cache) storeError(a roles.Assumption, e *entry, err *Error, now time.Time) {
	e.failures++
	e.err = err
	e.errUntil = now.Add(c.schedule.ErrorLifetime(err.Kind, e.failures))
	e.renewAt = now.Add(c.schedule.RetryAfter(err.Kind, e.failures))
	if c.flightContext.Err() == nil {
		c.log.Warn("credentials not obtained", "role", a.RoleARN, "session", a.SessionName, "kind", err.Kind,
			"code", err.Code, "message", err.Message, "failures", e.failures)
	}
}
