package credentials

import (
	"math"
	"slices"
	"time"
)

const (
	// background limits concurrent calls that no client waits for: 8 renewals and 8 prefetches.
	background = 8
	// podPace, in calls a second, and podBurst limit the calls for the clients of one pod. A pod needs one
	// call for each role that it is given, and a few more while STS fails, which the schedule spreads. A pod
	// whose annotations change all the time must leave the node's tokens to its neighbours.
	podPace, podBurst = 0.2, 20
)

// queue decides which flight calls STS next. The cache's mutex guards it.
//
// Pods with waiting clients are served round-robin. A pod has at most one queued flight, for its latest
// assumption, and one running call. Flights for the holders of an assumption wait in backlogs, first come,
// first served. A flight may wait in both. Each call takes a token of the Pace. The queue has no
// goroutines: Run dispatches after each change, and when the next token is due.
type queue struct {
	requesters      map[string]*requester // by pod; those that asked lately
	roundRobin      []*requester          // those with a request, the next one first
	renew, prefetch backlog               // separate, because renewals must not wait behind many new pods
	renewedLast     bool                  // the last call for a backlog was a renewal
}

// requester is a pod whose clients asked for credentials that the cache did not have.
type requester struct {
	calls   bucket
	request *podRequest // nil if the pod is not in roundRobin
	calling bool        // a call for the pod is running
}

// podRequest is what the clients of one pod wait for.
type podRequest struct {
	flight     *flight
	superseded chan struct{} // closed when the pod asks for another assumption before STS is called
}

// backlog is a queue of flights that no client needs to wait for.
type backlog struct {
	flights []*flight
	calls   int // running
}

// enqueue makes the flight the pod's request, in place of its former one. The mutex is held.
func (c *Cache) enqueue(pod string, f *flight, now time.Time) *podRequest {
	r := c.requesters[pod]
	if r == nil {
		r = &requester{calls: bucket{made: podBurst, most: podBurst, perSecond: podPace, at: now}}
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

// dequeue removes the flight from the queue, and the requests of all pods for it. The mutex is held.
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

// never means that no timer is needed: another event calls dispatch again.
const never = time.Duration(math.MaxInt64)

// dispatch starts all calls that may start now, and returns how long it is until it must be called again.
// The mutex is held.
func (c *Cache) dispatch(now time.Time) time.Duration {
	if c.closed {
		return never
	}
	return min(c.dispatchRequests(now), c.dispatchBackground(now))
}

// dispatchRequests starts the calls of pods with waiting clients, and returns how long it is until the next
// one may start.
func (c *Cache) dispatchRequests(now time.Time) time.Duration {
	for {
		r, wait := c.nextRequester(now)
		if r == nil {
			return wait
		}
		if wait := c.token(now, true); wait > 0 {
			return wait
		}
		f := r.request.flight
		f.chargedTo, r.calling = r, true
		r.calls.taken++
		c.start(f)
	}
}

// nextRequester returns the first pod in roundRobin whose call may start, or nil and how long it is until
// one may.
func (c *Cache) nextRequester(now time.Time) (*requester, time.Duration) {
	wait := never
	for _, r := range c.roundRobin {
		if r.calling {
			continue
		}
		r.calls.fill(now)
		w := r.calls.wait(r.calls.taken + 1)
		if w <= 0 {
			return r, 0
		}
		wait = min(wait, w)
	}
	return nil, wait
}

// dispatchBackground starts queued renewals and prefetches alternately, while tokens and slots last. It
// returns how long it is until the next token.
func (c *Cache) dispatchBackground(now time.Time) time.Duration {
	for {
		b := &c.renew
		if c.renewedLast && c.prefetch.ready() || !b.ready() {
			b = &c.prefetch
		}
		if !b.ready() {
			return never
		}
		if wait := c.token(now, false); wait > 0 {
			return wait
		}
		f := b.flights[0]
		f.backlogSlot = b
		b.calls++
		c.renewedLast = b == &c.renew
		c.start(f)
	}
}

func (b *backlog) ready() bool { return len(b.flights) > 0 && b.calls < background }

// token takes one of the node's tokens, or returns how long it is until there is one. It returns at most a
// second: the node's speed changes.
func (c *Cache) token(now time.Time, waiting bool) time.Duration {
	t := c.pace.Take(now, waiting)
	wait := t.Wait(now)
	if wait > 0 {
		t.GiveBack()
	}
	return min(wait, time.Second)
}

// callEnded releases the flight's background slot and its pod's call. The mutex is held.
func (c *Cache) callEnded(f *flight) {
	if f.backlogSlot != nil {
		f.backlogSlot.calls--
	}
	if f.chargedTo != nil {
		f.chargedTo.calling = false
	}
}

// forgetRequesters removes the pods whose bucket is full again, and which wait for nothing. The mutex is held.
func (c *Cache) forgetRequesters(now time.Time) {
	for pod, r := range c.requesters {
		r.calls.fill(now)
		if r.request == nil && !r.calling && r.calls.made-r.calls.taken >= podBurst {
			delete(c.requesters, pod)
		}
	}
}
