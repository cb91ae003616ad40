package credentials

import (
	"math"
	"slices"
	"time"
)

const (
	// maxBackgroundCalls limits concurrent renewals, and also concurrent prefetches.
	maxBackgroundCalls = 8
	// podRate, in calls a second, and podBurst limit the calls for the clients of one pod. A pod needs
	// one call for each role, and a few more while STS fails. A pod whose annotations change all the
	// time must leave the node's tokens to other pods.
	podRate, podBurst = 0.2, 20
)

// queue orders the calls to STS. The cache's mutex guards it.
//
// Pods with waiting clients are served round-robin. A pod has at most one queued flight, for its latest
// assumption, and one running call. Flights for holders wait in backlogs, first come, first served. A
// flight may wait in both. Each call takes a token of the Limiter. The queue has no goroutines: Run
// calls dispatch after each change, and when the next token is available.
type queue struct {
	requesters      map[string]*requester // by pod
	roundRobin      []*requester          // those with a request, the next one first
	renew, prefetch backlog               // separate, because renewals must not wait behind many new pods
	renewedLast     bool                  // the last background call was a renewal
}

// requester is a pod whose clients asked for credentials that were not cached.
type requester struct {
	calls   bucket
	request *podRequest // nil if the pod is not in roundRobin
	calling bool        // a call for the pod is running
}

// podRequest is what the clients of one pod wait for.
type podRequest struct {
	flight     *flight
	superseded chan struct{} // closed if the pod asks for another assumption before STS is called
}

// backlog is a queue of flights that no client waits for.
type backlog struct {
	flights []*flight
	calls   int // running
}

// enqueue replaces the pod's request by the flight. The mutex is held.
func (c *Cache) enqueue(pod string, f *flight, now time.Time) *podRequest {
	r := c.requesters[pod]
	if r == nil {
		r = &requester{calls: bucket{made: podBurst, burst: podBurst, rate: podRate, updated: now}}
		c.requesters[pod] = r
	}
	former := r.request
	if former != nil && former.flight == f {
		return former
	}
	r.request = &podRequest{flight: f, superseded: make(chan struct{})}
	if former == nil {
		c.roundRobin = append(c.roundRobin, r)
	} else {
		close(former.superseded)
	}
	return r.request
}

// enqueueBackground queues a flight for the holders of its assumption. The mutex is held.
func (c *Cache) enqueueBackground(f *flight) {
	if f == nil || !f.queued || f.backlog != nil {
		return
	}
	f.backlog = &c.prefetch
	if f.entry.document != nil {
		f.backlog = &c.renew
	}
	f.backlog.flights = append(f.backlog.flights, f)
}

// dequeue removes the flight and all requests for it. The mutex is held.
func (c *Cache) dequeue(f *flight) {
	f.queued = false
	if f.backlog != nil {
		f.backlog.flights = slices.DeleteFunc(f.backlog.flights, func(other *flight) bool { return other == f })
		f.backlog = nil
	}
	c.roundRobin = slices.DeleteFunc(c.roundRobin, func(r *requester) bool {
		if r.request.flight != f {
			return false
		}
		r.request = nil
		return true
	})
}

// never is the delay if an event other than a timer calls dispatch again.
const never = time.Duration(math.MaxInt64)

// dispatch starts all calls that may start now and returns the time until it must be called again. The
// mutex is held.
func (c *Cache) dispatch(now time.Time) time.Duration {
	if c.closed {
		return never
	}
	return min(c.dispatchRequests(now), c.dispatchBackground(now))
}

// dispatchRequests starts the calls of pods with waiting clients.
func (c *Cache) dispatchRequests(now time.Time) time.Duration {
	for {
		r, delay := c.nextRequester(now)
		if r == nil {
			return delay
		}
		if delay := c.takeToken(now, true); delay > 0 {
			return delay
		}
		f := r.request.flight
		f.requester, r.calling = r, true
		r.calls.taken++
		c.start(f)
	}
}

// nextRequester returns the first pod in roundRobin whose call may start, or nil and the time until one
// may.
func (c *Cache) nextRequester(now time.Time) (*requester, time.Duration) {
	delay := never
	for _, r := range c.roundRobin {
		if r.calling {
			continue
		}
		r.calls.fill(now)
		d := r.calls.delay(r.calls.taken + 1)
		if d <= 0 {
			return r, 0
		}
		delay = min(delay, d)
	}
	return nil, delay
}

// dispatchBackground starts queued renewals and prefetches alternately.
func (c *Cache) dispatchBackground(now time.Time) time.Duration {
	for {
		b := &c.renew
		if c.renewedLast && c.prefetch.isReady() || !b.isReady() {
			b = &c.prefetch
		}
		if !b.isReady() {
			return never
		}
		if delay := c.takeToken(now, false); delay > 0 {
			return delay
		}
		f := b.flights[0]
		f.calledFrom = b
		b.calls++
		c.renewedLast = b == &c.renew
		c.start(f)
	}
}

func (b *backlog) isReady() bool { return len(b.flights) > 0 && b.calls < maxBackgroundCalls }

// takeToken takes one of the node's tokens, or returns the time until one is available, at most a
// second because the rate changes.
func (c *Cache) takeToken(now time.Time, foreground bool) time.Duration {
	r := c.limiter.Reserve(now, foreground)
	delay := r.Delay(now)
	if delay > 0 {
		r.Cancel()
	}
	return min(delay, time.Second)
}

// removeIdleRequesters removes the pods that wait for nothing and whose bucket is full. The mutex is held.
func (c *Cache) removeIdleRequesters(now time.Time) {
	for pod, r := range c.requesters {
		r.calls.fill(now)
		if r.request == nil && !r.calling && r.calls.made-r.calls.taken >= podBurst {
			delete(c.requesters, pod)
		}
	}
}
