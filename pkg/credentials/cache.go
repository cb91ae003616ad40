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

// Assumer issues credentials. An error that is no *Error counts as Unavailable.
type Assumer interface {
	AssumeRole(ctx context.Context, a roles.Assumption) (*Credentials, error)
}

// Observer counts requests and calls. Its methods must not block.
type Observer interface {
	// Assumed counts a finished call to STS. The outcome is "ok" or the name of the error's Kind.
	Assumed(outcome string, took time.Duration)
	// Asked counts a request for credentials. It is a hit if it did not wait for STS.
	Asked(hit bool)
}

// Config is the dependencies and settings of a Cache.
type Config struct {
	Log      *slog.Logger
	Observer Observer
	// Failed is called after a failed call to STS, for each holder of the assumption and after the
	// clients are answered.
	Failed   func(holder string, a roles.Assumption, err *Error)
	Schedule Schedule
}

// Cache has the newest credentials of each assumption that a pod of this node uses.
//
// Each assumption has at most one call to STS at a time, a flight, which Run starts. A client that
// hangs up does not cancel it for the others. Credentials with a holder are prefetched, renewed in
// the background, and removed with the last holder.
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
	minRemaining time.Duration // with less remaining, a request first tries to renew it
	renewAt      time.Time     // when Run queues the next flight if the entry has a holder
	err          *Error        // of the last flight, nil after a success
	errUntil     time.Time     // until then requests get err and start no flight
	failures     int           // in a row
	flight       *flight       // queued or running; nil for none
	pod          string        // the last pod that requested or held it
	holders      int
	idleUntil    time.Time // until then it is kept without a holder; zero if no client requested it
}

const (
	// idleLifetime is how long credentials without a holder are kept after the last request.
	idleLifetime = time.Minute
	// maxEntries bounds the cache. A node runs at most a few hundred pods.
	maxEntries = 4096
	// patience is how long a request waits for a renewal if the cached credentials are still valid.
	patience = 200 * time.Millisecond
)

// ErrClosed is the error of a cache whose Run has ended.
var ErrClosed = errors.New("credentials: the proxy is shutting down")

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
// valid. The error is an *Error, ErrClosed, that of ctx, or that the pod has since requested
// another assumption.
func (c *Cache) Get(ctx context.Context, pod string, a roles.Assumption) (*Document, error) {
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.entry(a)
	if e == nil {
		c.Observer.Asked(false)
		return nil, &Error{Kind: Throttled, Code: "TooManyAssumptions", Message: "the pods of this node use more assumptions than this proxy keeps"}
	}
	e.idleUntil, e.pod = now.Add(idleLifetime), pod
	if e.remaining(now) >= e.minRemaining || now.Before(e.errUntil) {
		c.Observer.Asked(true)
		return e.result(nil)
	}
	c.Observer.Asked(false)
	f := c.launch(a, e)
	c.request(pod, f)
	var timeout <-chan time.Time
	if e.remaining(now) > 0 {
		timeout = time.After(patience)
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

// result returns the credentials while they are valid, else err or the error of the last flight.
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

// Stats are the numbers of what a cache has.
type Stats struct {
	Entries, Holders int
	// Pending is the number of held assumptions that have neither credentials nor an error.
	Pending int
}

// Stats returns what the cache has now.
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
