package credentials

import (
	"math"
	"sync"
	"time"
)

// Pace limits how often a node calls STS: all nodes of an account share its quota, and a fleet that recovers from an outage
// must not overload STS again. (AssumeRole: 600 calls a second for an account and region, AWS STS quotas.)
//
// There are two buckets of tokens. Renewals and prefetches take from the background bucket. It is filled at paceFactor times
// the rate that the node's pods need in a steady state, and each new holder adds a token for its first call. Pods with waiting
// clients take from the waiting bucket, so that they never wait behind background calls.
//
// After STS throttles, both are filled more slowly. After any other failure, only the waiting bucket is. Both speeds recover with
// time. Failures do not slow renewals down, which are few: if STS fails half of the calls, twice as many are needed.
//
// Its methods take the time, which must not go back.
type Pace struct {
	mu         sync.Mutex
	held       int
	need       float64   // calls a second in a steady state
	throttled  float64   // the factor of both speeds, at most 1
	failing    float64   // a further factor of the waiting bucket's speed, at most 1
	at         time.Time // the time of both factors
	background bucket
	waiting    bucket
}

const (
	// paceFactor leaves room for failed calls: if half of them fail, two are needed for each success.
	paceFactor = 3
	// leastPace, in calls a second, is the background speed of a node with few pods.
	leastPace = 0.2
	// spare is how many background tokens a node saves besides those of its assumptions.
	spare = 8
	// waitingPace, in calls a second, and waitingBurst are the waiting bucket's.
	waitingPace, waitingBurst = 10, 50
	// leastThrottled and leastFailing are the lowest factors. An outage is no sign of too many calls, but the calls must not all
	// come back at its end.
	leastThrottled, leastFailing = 1.0 / 128, 1.0 / 16
	// recovery is how long it takes until the speed has doubled again.
	recovery = 30 * time.Second
)

// NewPace returns the Pace of a node without pods.
func NewPace(now time.Time) *Pace {
	p := &Pace{throttled: 1, failing: 1, at: now, background: bucket{made: spare, at: now}, waiting: bucket{made: waitingBurst, at: now}}
	p.fill(now)
	return p
}

// Hold adds an assumption with sessions of this length to what the node needs. LetGo removes it.
func (p *Pace) Hold(now time.Time, session time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.held++
	p.need += 1 / between(session).Seconds()
	p.fill(now)
}

// Bring adds the token for the first call of a new holder. A holder that changes its assumption adds no other token: otherwise its
// changes would escape the limit.
func (p *Pace) Bring(now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fill(now)
	p.background.made++
}

// LetGo undoes Hold.
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

// between returns the mean time between two calls for an assumption.
func between(session time.Duration) time.Duration {
	return session - scaled(renewLeast+renewSpread/2, session)
}

// Take takes a token of the waiting or the background bucket, which may be there only later.
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

// Ticket is a token of a Pace.
type Ticket struct {
	pace   *Pace
	bucket *bucket
	number float64
}

// Wait returns how long it is until the token is there at the present speed: zero or less if it is.
func (t Ticket) Wait(now time.Time) time.Duration {
	t.pace.mu.Lock()
	defer t.pace.mu.Unlock()
	t.pace.fill(now)
	return t.bucket.wait(t.number)
}

// GiveBack returns the token of a call that is not made.
func (t Ticket) GiveBack() {
	t.pace.mu.Lock()
	defer t.pace.mu.Unlock()
	t.bucket.made++
}

// Told adapts the speed to the outcome of a call, nil for a success.
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

// fill adds the tokens since the last call, and sets the speeds.
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

// bucket is a bucket of tokens. More may be taken than there are; the later ones wait.
type bucket struct {
	made, taken     float64 // so far
	perSecond, most float64 // most is the capacity
	at              time.Time
}

// wait returns how long it is until this number of tokens has been made.
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
