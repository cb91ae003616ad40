package credentials

import (
	"slices"
	"time"

	"golang.org/x/time/rate"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/ratelimit"
)

const (
	// maxBackgroundCalls limits concurrent renewals and prefetches.
	maxBackgroundCalls = 8
	// podRate, in calls a second, and podBurst limit the calls for the clients of one pod. A pod
	// needs one call for each role, and a few more while STS fails. Without the limit, a pod whose
	// annotations keep changing could take the node's tokens from other pods.
	podRate, podBurst = 0.2, 20
	// maxTokenWait is how long the queue waits for a token before it computes the wait again, because
	// the rate changes.
	maxTokenWait = time.Second
)

// queue orders the calls to STS. The cache's mutex guards it.
//
// Pods with waiting clients are served round-robin. A pod has at most one queued flight, for its
// latest assumption, and one running call. Renewals and prefetches wait in the background queue. A
// pod holds one assumption, so it has at most one flight there. Flights with fewer failures go
// first, so pods that STS refuses do not delay the renewals of others. A flight can be in both
// queues. Each call takes a token of the Limiter. The queue has no goroutines: Run takes the
// flights out.
type queue struct {
	limiter         *Limiter
	failures        *ratelimit.Keyed[string] // limits how often a pod's failures lower the rate
	requesters      map[string]*requester    // by pod
	roundRobin      []*requester             // those with a flight, the next one first
	background      []*flight
	backgroundCalls int // running
}

// requester is a pod whose clients requested credentials that were not cached.
type requester struct {
	calls   *rate.Limiter
	flight  *flight // nil if the pod is not in roundRobin
	calling bool    // a call for the pod is running
}

// request queues the flight for the pod's clients, in place of the flight that the pod requested
// before. The mutex is held.
func (c *Cache) request(pod string, f *flight) {
	r := c.requesters[pod]
	if r == nil {
		r = &requester{calls: rate.NewLimiter(podRate, podBurst)}
		c.requesters[pod] = r
	}
	former := r.flight
	if !f.queued || former == f {
		return
	}
	r.flight = f
	if former == nil {
		c.roundRobin = append(c.roundRobin, r)
	} else {
		c.dropUnused(former)
	}
	c.wakeUp()
}

// dropUnused drops a queued flight whose assumption no pod holds, unless a pod requests it and a
// client waits for it. The mutex is held.
func (c *Cache) dropUnused(f *flight) {
	isRequested := slices.ContainsFunc(c.roundRobin, func(r *requester) bool { return r.flight == f })
	if !f.queued || f.entry.holders > 0 || f.waiting > 0 && isRequested {
		return
	}
	c.dequeue(f)
	e := f.entry
	e.flight = nil
	if e.document == nil && e.err == nil {
		delete(c.entries, f.assumption)
	}
	f.err = errSuperseded
	close(f.done)
}

// dequeue removes the flight and all requests for it. The mutex is held.
func (c *Cache) dequeue(f *flight) {
	f.queued, f.inBackground = false, false
	c.background = slices.DeleteFunc(c.background, func(other *flight) bool { return other == f })
	c.roundRobin = slices.DeleteFunc(c.roundRobin, func(r *requester) bool {
		if r.flight != f {
			return false
		}
		r.flight = nil
		return true
	})
}

// next returns a queued flight whose call may start now, or nil and how long to wait before the
// next attempt. Flights that clients wait for come first. The mutex is held.
func (c *Cache) next(now time.Time) (*flight, time.Duration) {
	wait := idleLifetime
	if len(c.roundRobin)+len(c.background) > 0 {
		wait = maxTokenWait
	}
	if i := slices.IndexFunc(c.roundRobin, func(r *requester) bool { return !r.calling && r.calls.TokensAt(now) >= 1 }); i >= 0 {
		r := c.roundRobin[i]
		if wait = min(wait, c.limiter.Take(now, true)); wait <= 0 {
			r.calls.AllowN(now, 1)
			r.calling, r.flight.caller = true, r
			return r.flight, 0
		}
	}
	if len(c.background) > 0 && c.backgroundCalls < maxBackgroundCalls {
		if wait = min(wait, c.limiter.Take(now, false)); wait <= 0 {
			c.backgroundCalls++
			return slices.MinFunc(c.background, func(a, b *flight) int { return a.entry.failures - b.entry.failures }), 0
		}
	}
	return nil, wait
}
