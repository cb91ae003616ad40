// Package credentials obtains temporary credentials from STS, caches them and renews them in time.
package credentials

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/ratelimit"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
)

// Assumer obtains credentials from STS. An error that is no *Error counts as Unavailable.
type Assumer interface {
	AssumeRole(ctx context.Context, a roles.Assumption) (*Credentials, error)
}

// Observer counts requests and calls. Its methods must not block.
type Observer interface {
	// Assumed counts a finished call to STS. The outcome is "ok" or the name of the error's Kind.
	Assumed(outcome string, took time.Duration)
	// Requested counts a request for credentials. hit is true if the request did not wait for STS.
	Requested(hit bool)
}

// Config is the dependencies and settings of a Cache.
type Config struct {
	Log      *slog.Logger
	Observer Observer
	// Failed is called after a failed call to STS, once for each holder of the assumption. By then
	// the waiting clients have their answer.
	Failed   func(holder string, a roles.Assumption, err *Error)
	Schedule Schedule
}

// Cache has the newest credentials of each assumption that a pod of this node uses.
//
// Each assumption has at most one call to STS at a time, a flight, which Run starts. A client that
// closes its connection does not cancel the flight, because other clients may wait for it.
// Credentials with a holder are prefetched, renewed in the background, and removed with the last
// holder.
type Cache struct {
	Config
	sts   Assumer
	wake  chan struct{} // makes Run sweep
	ended chan struct{} // closed when Run ends

	mu      sync.Mutex
	entries map[roles.Assumption]*entry
	holders map[string]*holder // by the pod's UID
	queue
}

// entry is the state of one assumption. The cache's mutex guards it.
type entry struct {
	document     *Document     // nil until the first success
	minRemaining time.Duration // if less of its lifetime remains, a request first tries to renew it
	renewAt      time.Time     // when Run queues the next flight if the entry has a holder
	err          *Error        // the last flight's; nil after a success
	errUntil     time.Time     // until then requests return err and start no flight
	failures     int           // consecutive ones
	flight       *flight       // queued or running; nil for none
	pod          string        // the last pod that requested or held it
	holders      int
	idleUntil    time.Time // until then it stays without a holder; zero if no client requested it
}

const (
	// idleLifetime is how long credentials without a holder are kept after the last request.
	idleLifetime = time.Minute
	// maxEntries bounds the cache. A node runs at most a few hundred pods.
	maxEntries = 4096
	// renewalWait is how long a request waits for a renewal if the cached credentials are still
	// valid.
	renewalWait = 200 * time.Millisecond
)

// ErrClosed is the error of a cache whose Run has ended.
var ErrClosed = errors.New("credentials: the proxy is shutting down")

// errSuperseded is the error of requests whose flight is dropped because the pod requests another
// assumption.
var errSuperseded = errors.New("credentials: the pod's annotations changed before STS was asked")

// New returns an empty cache. Its Run makes the calls to STS.
func New(sts Assumer, c Config) *Cache {
	return &Cache{
		Config: c, sts: sts, wake: make(chan struct{}, 1), ended: make(chan struct{}),
		entries: make(map[roles.Assumption]*entry), holders: make(map[string]*holder),
		queue: queue{limiter: NewLimiter(time.Now()), requesters: make(map[string]*requester),
			failures: ratelimit.NewKeyed[string](rate.Every(recovery), 1)},
	}
}

// Get returns credentials for a client of the pod with this UID: cached ones if they remain valid
// for long enough, else those of a flight. If STS fails, it returns cached ones that are still
// valid. The error is an *Error, ErrClosed, that of ctx, or errSuperseded if the pod requested
// another assumption before STS was called.
func (c *Cache) Get(ctx context.Context, pod string, a roles.Assumption) (*Document, error) {
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.entry(a)
	if e == nil {
		c.Observer.Requested(false)
		return nil, &Error{Kind: Throttled, Code: "TooManyAssumptions", Message: "the pods of this node use more assumptions than this proxy keeps"}
	}
	e.idleUntil, e.pod = now.Add(idleLifetime), pod
	if e.remaining(now) >= e.minRemaining || now.Before(e.errUntil) {
		c.Observer.Requested(true)
		return e.result(nil)
	}
	c.Observer.Requested(false)
	f := c.flightFor(a, e)
	c.request(pod, f)
	var timeout <-chan time.Time
	if e.remaining(now) > 0 {
		timeout = time.After(renewalWait)
	}
	f.waiting++
	c.mu.Unlock()
	var err error
	select {
	case <-f.done:
		err = f.err
	case <-c.ended:
		err = ErrClosed
	case <-timeout:
	case <-ctx.Done():
		err = ctx.Err()
	}
	c.mu.Lock()
	f.waiting--
	c.dropUnused(f)
	return e.result(err)
}

// remaining returns how long the credentials remain valid, negative if there are none.
func (e *entry) remaining(now time.Time) time.Duration {
	if e.document == nil {
		return -1
	}
	return e.document.expiration.Sub(now)
}

// result returns the credentials if they are valid, else err if it is not nil, else the error of
// the last flight.
func (e *entry) result(err error) (*Document, error) {
	switch {
	case e.remaining(time.Now()) > 0:
		return e.document, nil
	case err != nil:
		return nil, err
	case e.err != nil:
		return nil, e.err
	}
	return nil, &Error{Kind: Unavailable, Code: "Expired", Message: "the credentials ended and STS has not answered"}
}

// entry returns the assumption's entry, a new one if needed, or nil if the cache is full. The mutex
// is held.
func (c *Cache) entry(a roles.Assumption) *entry {
	e := c.entries[a]
	if e == nil && (len(c.entries) < maxEntries || c.evict()) {
		e = new(entry)
		c.entries[a] = e
	}
	return e
}

// evict removes an entry without holder and flight. It returns false if there is none. The mutex is
// held.
func (c *Cache) evict() bool {
	for a, e := range c.entries {
		if e.holders == 0 && e.flight == nil {
			delete(c.entries, a)
			return true
		}
	}
	return false
}

// Stats describe the contents of a cache.
type Stats struct {
	// Entries is the number of assumptions. Holders is the number of pods that hold one, or that held
	// one and are not forgotten.
	Entries, Holders int
	// Pending is the number of held assumptions that have neither credentials nor an error.
	Pending int
}

// Stats returns the current Stats.
func (c *Cache) Stats() Stats {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := Stats{Entries: len(c.entries), Holders: len(c.holders)}
	for _, e := range c.entries {
		if e.holders > 0 && e.document == nil && e.err == nil {
			s.Pending++
		}
	}
	return s
}

// Failure returns the error of the last call to STS for the assumption, or nil if it succeeded or
// there was none.
func (c *Cache) Failure(a roles.Assumption) *Error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e := c.entries[a]; e != nil {
		return e.err
	}
	return nil
}
