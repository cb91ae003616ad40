package credentials

import (
	"context"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
)

// flightTimeout bounds one call to STS.
const flightTimeout = 15 * time.Second

// flight is one call to STS, which first waits in the queue. The cache's mutex guards all fields
// except assumption, entry and done, which do not change.
type flight struct {
	assumption   roles.Assumption
	entry        *entry
	done         chan struct{} // closed when the entry has the result, or the flight is dropped
	err          error         // set if the flight is dropped
	queued       bool          // the call has not started
	inBackground bool          // the flight is in the background queue
	waiting      int           // the number of clients that wait
	caller       *requester    // the pod that the call is made for; nil for a background call
}

// flightFor returns the entry's flight. If there is none, it returns a new one, which is not in a
// queue yet. The mutex is held.
func (c *Cache) flightFor(a roles.Assumption, e *entry) *flight {
	if e.flight == nil {
		e.flight = &flight{assumption: a, entry: e, done: make(chan struct{}), queued: true}
	}
	return e.flight
}

// assumeRole calls STS, stores the result, and reports a failure to the holders. If ctx has ended,
// it discards the result, because Run has ended too.
func (c *Cache) assumeRole(ctx context.Context, f *flight) {
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
	for _, holder := range holders { // last, because Failed may take long
		c.Failed(holder, f.assumption, failure)
	}
}

// finish stores the result in the flight's entry, answers the waiting clients, and returns the
// holders to notify of a failure. While the cached credentials are valid, it returns holders only
// if STS refuses the role: another failed renewal may succeed when it is repeated.
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
	// Each pod lowers the node's rate at most once in the time recovery. Otherwise a pod that keeps
	// changing its annotations would keep the rate low for all pods, because each change is a new
	// assumption whose call may fail.
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
	// Credentials never replace those that expire later.
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
