// Package ratelimit limits how often each of many callers may act.
package ratelimit

import (
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// Keyed has a token bucket for each key. It remembers at most MaxKeys buckets.
type Keyed[K comparable] struct {
	limit rate.Limit
	burst int

	mu      sync.Mutex
	buckets map[K]*rate.Limiter
}

// MaxKeys is the number of buckets that are remembered. A node runs fewer pods.
const MaxKeys = 1024

// NewKeyed returns buckets of burst tokens that gain limit tokens a second. rate.Inf allows
// everything.
func NewKeyed[K comparable](limit rate.Limit, burst int) *Keyed[K] {
	return &Keyed[K]{limit: limit, burst: burst, buckets: make(map[K]*rate.Limiter)}
}

// Allow takes a token from the key's bucket, or returns false if the bucket is empty.
func (k *Keyed[K]) Allow(key K, now time.Time) bool {
	wait, ok := k.Reserve(key, now, 0)
	return ok && wait == 0
}

// Reserve takes the next token of the key's bucket and returns how long the caller must wait before
// it acts. If that is longer than maxWait, Reserve takes no token and returns maxWait and false.
func (k *Keyed[K]) Reserve(key K, now time.Time, maxWait time.Duration) (wait time.Duration, ok bool) {
	if k.limit == rate.Inf {
		return 0, true
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	r := k.bucket(key, now).ReserveN(now, 1)
	if wait := r.DelayFrom(now); wait <= maxWait {
		return wait, true
	}
	r.CancelAt(now)
	return maxWait, false
}

func (k *Keyed[K]) bucket(key K, now time.Time) *rate.Limiter {
	b := k.buckets[key]
	if b == nil {
		if len(k.buckets) >= MaxKeys {
			k.evict(now)
		}
		b = rate.NewLimiter(k.limit, k.burst)
		k.buckets[key] = b
	}
	return b
}

// evict removes full buckets, which are equal to new ones. If none is full, it removes all buckets,
// which briefly allows more than the limit: the memory must stay bounded.
func (k *Keyed[K]) evict(now time.Time) {
	for key, b := range k.buckets {
		if b.TokensAt(now) >= float64(k.burst) {
			delete(k.buckets, key)
		}
	}
	if len(k.buckets) >= MaxKeys {
		clear(k.buckets)
	}
}
