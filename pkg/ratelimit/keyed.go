// Package ratelimit bounds how often each of many callers may do something.
package ratelimit

import (
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// Keyed gives each key a token bucket of its own. It remembers at most MaxKeys of them.
type Keyed[K comparable] struct {
	limit rate.Limit
	burst int

	mu      sync.Mutex
	buckets map[K]*rate.Limiter
}

// MaxKeys is how many buckets are remembered. A node runs fewer pods.
const MaxKeys = 1024

// NewKeyed returns buckets that hold burst tokens and gain limit tokens a second. With rate.Inf everything is allowed.
func NewKeyed[K comparable](limit rate.Limit, burst int) *Keyed[K] {
	return &Keyed[K]{limit: limit, burst: burst, buckets: make(map[K]*rate.Limiter)}
}

// Allow takes a token of the key's bucket. It returns false where the bucket has none.
func (k *Keyed[K]) Allow(key K, now time.Time) bool {
	wait, ok := k.Reserve(key, now, 0)
	return ok && wait == 0
}

// Reserve takes a token that the key's bucket has now or will have within most, and returns how long the caller must wait before it
// uses the token. Where that would be longer than most, it takes none and returns most and false.
func (k *Keyed[K]) Reserve(key K, now time.Time, most time.Duration) (wait time.Duration, ok bool) {
	if k.limit == rate.Inf {
		return 0, true
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	r := k.bucket(key, now).ReserveN(now, 1)
	if wait := r.DelayFrom(now); wait <= most {
		return wait, true
	}
	r.CancelAt(now)
	return most, false
}

func (k *Keyed[K]) bucket(key K, now time.Time) *rate.Limiter {
	b := k.buckets[key]
	if b == nil {
		if len(k.buckets) >= MaxKeys {
			k.forget(now)
		}
		b = rate.NewLimiter(k.limit, k.burst)
		k.buckets[key] = b
	}
	return b
}

// forget removes full buckets, which are as good as new ones. Where none is full it removes all, because the memory must stay bounded.
func (k *Keyed[K]) forget(now time.Time) {
	for key, b := range k.buckets {
		if b.TokensAt(now) >= float64(k.burst) {
			delete(k.buckets, key)
		}
	}
	if len(k.buckets) >= MaxKeys {
		clear(k.buckets)
	}
}
