package credentials

import (
	"math"
	"time"

	"golang.org/x/time/rate"
)

// Limiter limits how often a node calls STS. All nodes of an account share the account's quota, 600
// calls of AssumeRole a second in each region. After an outage, the nodes must not overload STS
// again.
//
// There are two token buckets. Renewals and prefetches use the background bucket. Its rate is
// rateFactor times the rate that the node's pods need in a steady state, and each new holder adds a
// token for its first call. Calls that clients wait for use the foreground bucket, so they never
// wait behind background calls.
//
// Throttling by STS lowers both rates. Any other temporary failure lowers only the foreground rate:
// if half of the renewals fail, twice as many are needed. Both rates recover with time.
//
// It is not safe for concurrent use.
type Limiter struct {
	need       float64   // calls a second in a steady state
	held       int       // assumptions
	firstCalls int       // background tokens of new holders, in addition to the bucket
	throttled  float64   // factor of both rates, at most 1
	failing    float64   // further factor of the foreground rate, at most 1
	updated    time.Time // when both factors were computed
	background *rate.Limiter
	foreground *rate.Limiter
}

const (
	rateFactor = 3 // leaves room for failed calls
	// minRate is the background rate, in calls a second, of a node with few pods.
	minRate                         = 0.2
	backgroundBurst                 = 8
	foregroundRate, foregroundBurst = 10, 50
	// minThrottled and minFailing bound the factors from below. minFailing is higher, because too
	// many calls are not the cause of an outage.
	minThrottled, minFailing = 1.0 / 128, 1.0 / 16
	// recovery is the time in which a lowered rate doubles.
	recovery = 30 * time.Second
)

// NewLimiter returns the Limiter of a node without pods.
func NewLimiter(now time.Time) *Limiter {
	return &Limiter{throttled: 1, failing: 1, updated: now,
		background: rate.NewLimiter(minRate, backgroundBurst), foreground: rate.NewLimiter(foregroundRate, foregroundBurst)}
}

// AddHolder adds an assumption with sessions of this length. If the holder is new, it adds a token
// for the first call. An existing holder that changes its assumption gets no token, because the
// limit must apply to its changes.
func (l *Limiter) AddHolder(session time.Duration, isNew bool) {
	l.held++
	l.need += 1 / renewalInterval(session).Seconds()
	if isNew {
		l.firstCalls++
	}
}

// RemoveHolder removes an assumption with sessions of this length.
func (l *Limiter) RemoveHolder(session time.Duration) {
	l.held--
	l.need -= 1 / renewalInterval(session).Seconds()
	l.firstCalls = min(l.firstCalls, l.held)
}

// renewalInterval returns the mean time between two calls for an assumption.
func renewalInterval(session time.Duration) time.Duration {
	return session - scaled(renewBefore+renewJitter/2, session)
}

// Take takes a foreground or a background token and returns 0. If there is none, it returns the
// time until one is available at the current rate.
func (l *Limiter) Take(now time.Time, foreground bool) time.Duration {
	l.update(now)
	switch {
	case foreground:
		return take(l.foreground, now)
	case l.firstCalls > 0:
		l.firstCalls--
		return 0
	}
	return take(l.background, now)
}

// take takes a token and returns 0. If there is none, it returns the time until one is available.
func take(l *rate.Limiter, now time.Time) time.Duration {
	r := l.ReserveN(now, 1)
	wait := r.DelayFrom(now)
	if wait > 0 {
		r.CancelAt(now)
	}
	return wait
}

// Observe lowers the rates after a failed call.
func (l *Limiter) Observe(now time.Time, failure *Error) {
	l.update(now)
	switch failure.Kind {
	case Throttled:
		l.throttled = max(minThrottled, l.throttled/2)
	case Unavailable:
		l.failing = max(minFailing, l.failing/2)
	}
	l.update(now)
}

// update computes the rates at this time and applies them to the buckets.
func (l *Limiter) update(now time.Time) {
	growth := math.Exp2(now.Sub(l.updated).Seconds() / recovery.Seconds())
	l.throttled, l.failing, l.updated = min(1, l.throttled*growth), min(1, l.failing*growth), now
	l.background.SetLimitAt(now, rate.Limit(l.throttled*max(minRate, rateFactor*l.need)))
	l.foreground.SetLimitAt(now, rate.Limit(l.throttled*l.failing*foregroundRate))
}
