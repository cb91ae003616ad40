package credentials

import (
	"math"
	"sync"
	"time"
)

// Limiter limits how often a node calls STS. All nodes of an account share its quota (600 calls of
// AssumeRole a second and region), and a recovering fleet must not overload STS again.
//
// There are two token buckets. Renewals and prefetches use the background bucket. Its rate is rateFactor
// times what the node's pods need in a steady state, and each new holder adds a token for its first
// call. Calls that clients wait for use the foreground bucket, so they never wait behind background calls.
//
// Throttling by STS lowers both rates, any other temporary failure only the foreground rate: if STS
// fails half of the renewals, twice as many are needed. Both rates recover with time.
//
// The times that are passed to its methods must not decrease.
type Limiter struct {
	mu         sync.Mutex
	held       int       // assumptions
	need       float64   // calls a second in a steady state
	throttled  float64   // factor of both rates, at most 1
	failing    float64   // further factor of the foreground rate, at most 1
	updated    time.Time // when both factors were computed
	background bucket
	foreground bucket
}

const (
	rateFactor = 3 // leaves room for failed calls
	// minRate is the background rate, in calls a second, of a node with few pods.
	minRate = 0.2
	// extraTokens is the background burst in excess of one token for each assumption.
	extraTokens                     = 8
	foregroundRate, foregroundBurst = 10, 50
	// minFailing is higher than minThrottled: an outage is not caused by too many calls.
	minThrottled, minFailing = 1.0 / 128, 1.0 / 16
	// recovery is the time in which a lowered rate doubles.
	recovery = 30 * time.Second
)

// NewLimiter returns the Limiter of a node without pods.
func NewLimiter(now time.Time) *Limiter {
	l := &Limiter{throttled: 1, failing: 1, updated: now,
		background: bucket{made: extraTokens, updated: now}, foreground: bucket{made: foregroundBurst, updated: now}}
	l.update(now)
	return l
}

// AddHolder adds an assumption with sessions of this length. If the holder is new, it adds a token for
// the first call. An existing holder that changes its assumption gets no token, or its changes would
// escape the limit.
func (l *Limiter) AddHolder(now time.Time, session time.Duration, isNew bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.held++
	l.need += 1 / renewalInterval(session).Seconds()
	l.update(now)
	if isNew {
		l.background.made++
	}
}

// RemoveHolder removes an assumption with sessions of this length.
func (l *Limiter) RemoveHolder(now time.Time, session time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.need -= 1 / renewalInterval(session).Seconds()
	if l.held--; l.held == 0 {
		l.need = 0 // without the rounding error
	}
	l.update(now)
}

// renewalInterval returns the mean time between two calls for an assumption.
func renewalInterval(session time.Duration) time.Duration {
	return session - scaled(renewBefore+renewJitter/2, session)
}

// Reserve reserves a token of the foreground or the background bucket, which may become available later.
func (l *Limiter) Reserve(now time.Time, foreground bool) Reservation {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.update(now)
	b := &l.background
	if foreground {
		b = &l.foreground
	}
	b.taken++
	return Reservation{limiter: l, bucket: b, number: b.taken}
}

// Reservation is a reserved token.
type Reservation struct {
	limiter *Limiter
	bucket  *bucket
	number  float64
}

// Delay returns how long it takes at the current rate until the token is available, at most 0 if it is.
func (r Reservation) Delay(now time.Time) time.Duration {
	r.limiter.mu.Lock()
	defer r.limiter.mu.Unlock()
	r.limiter.update(now)
	return r.bucket.delay(r.number)
}

// Cancel returns the token of a call that is not made.
func (r Reservation) Cancel() {
	r.limiter.mu.Lock()
	defer r.limiter.mu.Unlock()
	r.bucket.made++
}

// Observe lowers the rates after a failed call; err is nil for a success.
func (l *Limiter) Observe(now time.Time, err *Error) {
	if err == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.update(now)
	switch err.Kind {
	case Throttled:
		l.throttled = max(minThrottled, l.throttled/2)
	case Unavailable:
		l.failing = max(minFailing, l.failing/2)
	}
	l.update(now)
}

// update adds the tokens since the last update and computes the rates.
func (l *Limiter) update(now time.Time) {
	l.background.fill(now)
	l.foreground.fill(now)
	if d := now.Sub(l.updated); d > 0 {
		growth := math.Exp2(d.Seconds() / recovery.Seconds())
		l.throttled, l.failing, l.updated = min(1, l.throttled*growth), min(1, l.failing*growth), now
	}
	l.background.set(l.throttled*max(minRate, rateFactor*l.need), float64(extraTokens+l.held))
	l.foreground.set(l.throttled*l.failing*foregroundRate, foregroundBurst)
}

// bucket is a token bucket. More tokens may be taken than were made; the later ones become available
// in order, at the rate of that time. (A Reservation of x/time/rate keeps the rate of its beginning.)
type bucket struct {
	made, taken float64 // in total
	rate, burst float64 // rate is in tokens a second
	updated     time.Time
}

// delay returns how long it takes until this number of tokens has been made.
func (b *bucket) delay(number float64) time.Duration {
	return time.Duration((number - b.made) / b.rate * float64(time.Second))
}

func (b *bucket) set(rate, burst float64) {
	b.rate, b.burst = rate, burst
	b.made = min(b.made, b.taken+b.burst)
}

func (b *bucket) fill(now time.Time) {
	if d := now.Sub(b.updated); d > 0 {
		b.made, b.updated = min(b.made+d.Seconds()*b.rate, b.taken+b.burst), now
	}
}
