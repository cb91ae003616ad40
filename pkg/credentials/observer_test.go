package credentials

import (
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// observed is an Observer that counts.
type observed struct {
	mu           sync.Mutex
	assumed      map[string]int
	hits, misses int
	longest      time.Duration
}

func (o *observed) Assumed(outcome string, took time.Duration) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.assumed == nil {
		o.assumed = map[string]int{}
	}
	o.assumed[outcome]++
	o.longest = max(o.longest, took)
}

func (o *observed) Requested(hit bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if hit {
		o.hits++
	} else {
		o.misses++
	}
}

func TestObserverCountsCallsAndHits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := new(observed)
		sts := &fakeSTS{latency: time.Second}
		c := running(t, sts, Config{Observer: o})
		mustGet(t, c, assumption("a"))
		mustGet(t, c, assumption("a"))
		sts.set(func(s *fakeSTS) { s.err = &Error{Kind: Denied} })
		for range 2 { // the second gets the cached error
			if _, err := c.Get(t.Context(), "pod", assumption("b")); err == nil {
				t.Error("credentials")
			}
		}
		if o.assumed["ok"] != 1 || o.assumed["denied"] != 1 || o.longest != time.Second || o.hits != 2 || o.misses != 2 {
			t.Errorf("%+v", o)
		}
	})
}
