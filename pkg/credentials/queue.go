package credentials

import (
	"math"
	"slices"
	"time"
)

const (
	// background is how many calls may be on their way that no client waits for, of renewals and of prefetches each.
	background = 8
	// podPace, in calls a second, and podBurst are for the clients of one pod. A pod needs one call for each role that it is given, and a
	// few more while STS fails, which the schedule spreads. A pod that asks for another assumption all the time, by changes of its
	// annotations, must leave tokens of its node to its neighbours.
	podPace, podBurst = 0.2, 20
)

// queue decides which flight calls STS next. The cache's mutex guards it.
//
// Pods whose clients wait take turns: each has one place, for the assumption that it asked for last, and one call on its way. Flights
// for pods that hold credentials, or are to hold them, wait in backlogs, first come, first served. A flight may wait in both. Each
// call takes a token of the Pace. No goroutine waits here: Run dispatches whenever something changed and when a token is there.
type queue struct {
	requesters    map[string]*requester // by pod; those who have asked lately
	turns         []*requester          // those who want a call, the next one first
	renew, ahead  backlog               // renewals must not stand behind many pods that come
	renewedLately bool                  // the last call for a backlog was a renewal
}

// requester is a pod whose clients asked for credentials that were not there.
type requester struct {
	calls   bucket
	want    *want // nil while it has no place in turns
	calling bool  // a call that was made in its turn is on its way
}

// want is what the clients of one pod wait for.
type want struct {
	flight     *flight
	superseded chan struct{} // closed when the pod asked for another assumption before its turn came
}

// backlog is a queue of flights that no client needs to wait for.
type backlog struct {
	flights []*flight
	calls   int // on their way
}

// enqueue gives the pod a place in turns for the flight, in place of what it wanted before. The mutex is held.
func (c *Cache) enqueue(pod string, f *flight, now time.Time) *want {
	r := c.requesters[pod]
	if r == nil {
		r = &requester{calls: bucket{made: podBurst, most: podBurst, perSecond: podPace, at: now}}
		c.requesters[pod] = r
	}
	former := r.want
	if former != nil && former.flight == f {
		return former
	}
	r.want = &want{flight: f, superseded: make(chan struct{})}
	if former == nil {
		c.turns = append(c.turns, r)
	} else {
		close(former.superseded)
	}
	return r.want
}

// fetchAhead queues a flight for those who hold the entry's assumption. The mutex is held.
func (c *Cache) fetchAhead(f *flight) {
	if f == nil || !f.queued || f.backlog != nil {
		return
	}
	f.backlog = &c.ahead
	if f.entry.document != nil {
		f.backlog = &c.renew
	}
	f.backlog.flights = append(f.backlog.flights, f)
}

// dequeue takes the flight out of the queue, with the turns of all pods that want it. The mutex is held.
func (c *Cache) dequeue(f *flight) {
	f.queued = false
	if f.backlog != nil {
		f.backlog.flights = slices.DeleteFunc(f.backlog.flights, func(other *flight) bool { return other == f })
		f.backlog = nil
	}
	c.turns = slices.DeleteFunc(c.turns, func(r *requester) bool {
		if r.want.flight != f {
			return false
		}
		r.want = nil
		return true
	})
}

// never is the wait for what no time brings.
const never = time.Duration(math.MaxInt64)

// dispatch starts all calls that may be made now, and returns how long it is until it has to be called again. The mutex is held.
func (c *Cache) dispatch(now time.Time) time.Duration {
	if c.closed {
		return never
	}
	return min(c.takeTurns(now), c.workOff(now))
}

// takeTurns starts the calls of pods whose clients wait, and returns how long it is until the next may start.
func (c *Cache) takeTurns(now time.Time) time.Duration {
	for {
		r, wait := c.nextTurn(now)
		if r == nil {
			return wait
		}
		if wait := c.token(now, true); wait > 0 {
			return wait
		}
		f := r.want.flight
		f.turn, r.calling = r, true
		r.calls.taken++
		c.start(f)
	}
}

// nextTurn returns the first pod in turns that may have a call made, or nil and how long it is until one may.
func (c *Cache) nextTurn(now time.Time) (*requester, time.Duration) {
	wait := never
	for _, r := range c.turns {
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

// workOff starts the calls of the backlogs in the same manner. The backlogs alternate.
func (c *Cache) workOff(now time.Time) time.Duration {
	for {
		b := &c.renew
		if c.renewedLately && c.ahead.ready() || !b.ready() {
			b = &c.ahead
		}
		if !b.ready() {
			return never
		}
		if wait := c.token(now, false); wait > 0 {
			return wait
		}
		f := b.flights[0]
		f.slot = b
		b.calls++
		c.renewedLately = b == &c.renew
		c.start(f)
	}
}

func (b *backlog) ready() bool { return len(b.flights) > 0 && b.calls < background }

// token takes a token of the node's for one call, or returns how long it is until there is one.
func (c *Cache) token(now time.Time, waiting bool) time.Duration {
	t := c.pace.Take(now, waiting)
	wait := t.Wait(now)
	if wait > 0 {
		t.GiveBack()
	}
	return min(wait, time.Second) // how fast tokens come changes
}

// callEnded gives back what the flight's call took of the queue, for the next one. The mutex is held.
func (c *Cache) callEnded(f *flight) {
	if f.slot != nil {
		f.slot.calls--
	}
	if f.turn != nil {
		f.turn.calling = false
	}
}

// forgetRequesters drops what is known of pods that have not asked for long. The mutex is held.
func (c *Cache) forgetRequesters(now time.Time) {
	for pod, r := range c.requesters {
		r.calls.fill(now)
		if r.want == nil && !r.calling && r.calls.made-r.calls.taken >= podBurst {
			delete(c.requesters, pod)
		}
	}
}
