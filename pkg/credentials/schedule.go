package credentials

import (
	"math/rand/v2"
	"time"
)

const (
	// minRemaining is the shortest remaining lifetime that is served without an attempt to renew. If
	// less remains, botocore (900 s, and up to 600 s of jitter) and the Java SDK request new
	// credentials on every call.
	minRemaining = 1500 * time.Second
	// Credentials are renewed renewBefore to renewBefore+renewJitter before their expiration. The
	// jitter spreads the renewals of a fleet that started together.
	renewBefore, renewJitter = 1800 * time.Second, 300 * time.Second
	// fullSession is the session length that the values above apply to. For shorter sessions they
	// are scaled down.
	fullSession = time.Hour
)

// Schedule computes when STS is called again. The zero value is ready to use.
type Schedule struct {
	// ErrorTTL is how long an error is cached; zero selects a time by the kind of the error.
	ErrorTTL time.Duration
	// Rand is the source of randomness; nil for the default of math/rand/v2.
	Rand *rand.Rand
}

func (s Schedule) random(n time.Duration) time.Duration {
	if s.Rand != nil {
		return time.Duration(s.Rand.Int64N(int64(n)))
	}
	return rand.N(n)
}

// jitter returns a random time between d/2 and d, so that calls that failed together are not
// repeated together.
func (s Schedule) jitter(d time.Duration) time.Duration { return d/2 + s.random(d/2+1) }

// Renewal returns when to renew credentials with this expiration and lifetime. remaining is the
// remaining lifetime of the credentials that they replace, negative for none.
//
// The first renewal comes at a random earlier time. Otherwise the proxies that first called STS at
// the same time, after a common start or an outage, would renew at the same time for many hours.
func (s Schedule) Renewal(expiration time.Time, lifetime, remaining time.Duration) time.Time {
	due := expiration.Add(-scaled(renewBefore+s.random(renewJitter), lifetime))
	// The earliest time is after a minute, because many pods end before that.
	if earliest := expiration.Add(scaled(time.Minute, lifetime) - lifetime); remaining < scaled(minRemaining, lifetime) && due.After(earliest) {
		return earliest.Add(s.random(due.Sub(earliest)))
	}
	return due
}

// scaled returns d for a session of an hour or more, and proportionally less for a shorter one.
func scaled(d, lifetime time.Duration) time.Duration {
	if lifetime >= fullSession-time.Minute {
		return d
	}
	return time.Duration(float64(d) * float64(lifetime) / float64(fullSession))
}

// ErrorLifetime returns how long an error is cached. A denial is cached briefly: a changed policy
// takes effect within seconds, and its author waits for the effect. A malformed request is cached
// longer: only a changed annotation corrects it, and that is another assumption.
func (s Schedule) ErrorLifetime(k Kind, failures int) time.Duration {
	if s.ErrorTTL > 0 {
		return s.ErrorTTL
	}
	switch k {
	case Malformed:
		return 5 * time.Minute
	case Denied:
		return min(30*time.Second<<min(failures-1, 1), time.Minute)
	case Throttled:
		return s.jitter(min(2*time.Second<<min(failures-1, 5), time.Minute))
	}
	return s.jitter(min(500*time.Millisecond<<min(failures-1, 6), 30*time.Second))
}

// RetryAfter returns the delay before the next background call.
func (s Schedule) RetryAfter(k Kind, failures int) time.Duration {
	switch k {
	case Malformed:
		return 5*time.Minute + s.jitter(5*time.Minute)
	case Denied:
		return time.Minute + s.jitter(time.Minute)
	}
	return s.jitter(min(2*time.Second<<min(failures-1, 6), 2*time.Minute))
}
