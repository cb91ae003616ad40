package credentials

import (
	"math"
	"sync"
	"time"
)

// Pace spreads the calls to STS of a node over time: the account's quota is everybody's, and a fleet that comes back from an outage
// must not keep STS down. (AssumeRole: 600 calls a second for an account and region, AWS STS quotas.)
//
// There are two buckets of tokens. Renewals and prefetches take from one that is filled with paceFactor times what the node's
// pods need in a steady state, and to which each new holder brings the token for its first call. Pods that wait take from
// another, so they never stand behind those who do not.
//
// Both are filled more slowly after STS throttled, and the one of those who wait after it failed, too; and faster again as time goes
// by without that. A failure does not slow renewals down, which are few: where STS fails half of the calls, they must be twice as many.
//
// Its methods take the time, which must not go back.
type Pace struct {
	mu         sync.Mutex
	held       int
	need       float64   // calls a second in a steady state
	throttled  float64   // what is left of the speed of both; 1 for all
	failing    float64   // what is left besides of that of those who wait
	at         time.Time // when it was that
	background bucket
	waiting    bucket
}

const (
	// paceFactor leaves room for tries that fail: with half of them failing, two are needed for each success.
	paceFactor = 3
	// leastPace, in calls a second, is that of a node with few pods.
	leastPace = 0.2
	// spare is how many calls a node has saved up that no assumption brought.
	spare = 8
	// waitingPace, in calls a second, and waitingBurst are for pods that wait.
	waitingPace, waitingBurst = 10, 50
	// leastThrottled is the least that is left of a node's speed by throttling, and leastFailing by other failures: an outage is no sign of
	// too many calls, but they must not all come back at its end.
	leastThrottled, leastFailing = 1.0 / 128, 1.0 / 16
	// recovery is how long it takes to be twice as fast again.
	recovery = 30 * time.Second
)

// NewPace is that of a node without pods.
func NewPace(now time.Time) *Pace {
	p := &Pace{throttled: 1, failing: 1, at: now, background: bucket{made: spare, at: now}, waiting: bucket{made: waitingBurst, at: now}}
	p.fill(now)
	return p
}

// Hold says that an assumption of sessions of this length is held from now on, and LetGo that it is no more.
func (p *Pace) Hold(now time.Time, session time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.held++
	p.need += 1 / between(session).Seconds()
	p.fill(now)
}

// Bring adds the token for the first call of a holder that was not there before. A holder that holds one assumption after the other
// brings no more than this one: its changes would pass what keeps STS from being asked too often.
func (p *Pace) Bring(now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fill(now)
	p.background.made++
}

// LetGo is the opposite of Hold.
func (p *Pace) LetGo(now time.Time, session time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.held--; p.held == 0 {
		p.need = 0
	} else {
		p.need -= 1 / between(session).Seconds()
	}
	p.fill(now)
}

// between is the mean time between two calls for an assumption.
func between(session time.Duration) time.Duration {
	return session - scaled(renewLeast+renewSpread/2, session)
}

// Take is a place in the queue for a token, of those for pods that wait or of the others.
func (p *Pace) Take(now time.Time, waiting bool) Ticket {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fill(now)
	b := &p.background
	if waiting {
		b = &p.waiting
	}
	b.taken++
	return Ticket{pace: p, bucket: b, number: b.taken}
}

// Ticket is a place in a Pace's queue.
type Ticket struct {
	pace   *Pace
	bucket *bucket
	number float64
}

// Wait is how long it is until its call may be made, as it looks now: zero or less for at once.
func (t Ticket) Wait(now time.Time) time.Duration {
	t.pace.mu.Lock()
	defer t.pace.mu.Unlock()
	t.pace.fill(now)
	return t.bucket.wait(t.number)
}

// GiveBack is for a call that is not made.
func (t Ticket) GiveBack() {
	t.pace.mu.Lock()
	defer t.pace.mu.Unlock()
	t.bucket.made++
}

// Told learns from the outcome of a call, nil for a success.
func (p *Pace) Told(now time.Time, err *Error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fill(now)
	switch {
	case err == nil:
		return
	case err.Kind == Throttled:
		p.throttled = max(leastThrottled, p.throttled/2)
	case err.Kind == Unavailable:
		p.failing = max(leastFailing, p.failing/2)
	}
	p.fill(now)
}

// fill brings the buckets to this moment, and sets how fast they are filled from now on.
func (p *Pace) fill(now time.Time) {
	p.background.fill(now)
	p.waiting.fill(now)
	if d := now.Sub(p.at); d > 0 {
		faster := math.Exp2(d.Seconds() / recovery.Seconds())
		p.throttled, p.failing, p.at = min(1, p.throttled*faster), min(1, p.failing*faster), now
	}
	p.background.set(p.throttled*max(leastPace, paceFactor*p.need), float64(spare+p.held))
	p.waiting.set(p.throttled*p.failing*waitingPace, waitingBurst)
}

// bucket is a bucket of tokens, and a queue of those who take them.
type bucket struct {
	made, taken     float64 // so far; more may be taken than made
	perSecond, most float64 // most is how many are kept that nobody takes
	at              time.Time
}

// wait is how long it is until so many tokens have been made.
func (b *bucket) wait(number float64) time.Duration {
	return time.Duration((number - b.made) / b.perSecond * float64(time.Second))
}

func (b *bucket) set(perSecond, most float64) {
	b.perSecond, b.most = perSecond, most
	b.made = min(b.made, b.taken+b.most)
}

func (b *bucket) fill(now time.Time) {
	if d := now.Sub(b.at); d > 0 {
		b.made, b.at = min(b.made+d.Seconds()*b.perSecond, b.taken+b.most), now
	}
}
