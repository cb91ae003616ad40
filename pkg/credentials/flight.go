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
	assumption   roles.Assumption
	entry        *entry
	done         chan struct{} // closed when the entry has the result, or the flight was dropped
	err          error         // set if the flight was dropped
	queued       bool          // the call has not started
	inBackground bool          // waits in the background queue
	waiting      int           // clients
	caller       *requester    // the pod that the call is made for, nil for a background call
}

// launch returns the entry's flight, or a new one. The mutex is held.
func (c *Cache) launch(a roles.Assumption, e *entry) *flight {
	if e.flight == nil {
		e.flight = &flight{assumption: a, entry: e, done: make(chan struct{}), queued: true}
	}
	return e.flight
}

// fly calls STS, stores the result, and reports a failure to the holders. If ctx ends, so has Run,
// and the cache needs no result.
func (c *Cache) fly(ctx context.Context, f *flight) {
	call, cancel := context.WithTimeout(ctx, flightTimeout)
	defer cancel()
	start := time.Now()
	creds, err := c.sts.AssumeRole(call, f.assumption)
	now := time.Now()
	if ctx.Err() != nil {
		return
	}
	if err == nil && !creds.Expiration.After(now) {
		err = &Error{Kind: ClockSkew, Code: "ExpiredCredentials", Cause: "by the node's clock, the credentials that STS issued have already ended"}
	}
	failure := classify(err)
	outcome := "ok"
	if failure != nil {
		outcome = string(failure.Kind)
	}
	c.Observer.Assumed(outcome, now.Sub(start))
	holders := c.finish(f, creds, failure, now)
	c.wakeUp()
	for _, holder := range holders { // last, because it may take a while
		c.Failed(holder, f.assumption, failure)
	}
}

// finish stores the result in the flight's entry, answers the waiting clients, and returns the
// holders to notify of a failure. While their credentials are valid it returns them only if STS
// refuses the role; other failed renewals are repeated.
func (c *Cache) finish(f *flight, creds *Credentials, failure *Error, now time.Time) (holders []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	defer close(f.done)
	e := f.entry
	e.flight = nil
	if f.caller != nil {
		f.caller.calling = false
	} else {
		c.backgroundCalls--
	}
	if failure == nil {
		c.store(f.assumption, e, creds, now)
		return nil
	}
	c.storeError(f.assumption, e, failure, now)
	// Each pod lowers the node's rate at most once in recovery. Otherwise a pod that changes its
	// annotations all the time would keep the rate low for all pods: each change is a new
	// assumption that may fail.
	if (failure.Kind == Throttled || failure.Kind == Unavailable) && c.failures.Allow(e.pod, now) {
		c.limiter.Observe(now, failure)
	}
	if failure.Kind != Denied && failure.Kind != Malformed && e.remaining(now) > 0 {
		return nil
	}
	for pod, h := range c.holders {
		if h.entry == e {
			holders = append(holders, pod)
		}
	}
	return holders
}

func (c *Cache) store(a roles.Assumption, e *entry, creds *Credentials, now time.Time) {
	e.err, e.errUntil, e.failures = nil, time.Time{}, 0
	lifetime := creds.Expiration.Sub(now)
	e.renewAt = c.Schedule.Renewal(creds.Expiration, lifetime, e.remaining(now))
	// Credentials that expire earlier never replace those that expire later.
	if lifetime > e.remaining(now) {
		e.document, e.minRemaining = newDocument(creds), scaled(minRemaining, lifetime)
	}
	c.Log.Debug("credentials obtained", "role", a.RoleARN, "session", a.SessionName, "expiration", creds.Expiration)
}

func (c *Cache) storeError(a roles.Assumption, e *entry, err *Error, now time.Time) {
	e.failures++
	e.err = err
	e.errUntil = now.Add(c.Schedule.ErrorLifetime(err.Kind, e.failures))
	e.renewAt = now.Add(c.Schedule.RetryAfter(err.Kind, e.failures))
	c.Log.Warn("credentials not obtained", "role", a.RoleARN, "session", a.SessionName, "kind", err.Kind,
		"code", err.Code, "message", err.Message, "failures", e.failures)
}
