// Package credentials obtains temporary credentials from STS, caches them and renews them in time.
package credentials

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

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
	Log *slog.Logger
	// Observer may be nil.
	Observer Observer
	// Failed is called after a failed call to STS, for each holder of the assumption and after the
	// clients are answered. It may be nil.
	Failed   func(holder string, a roles.Assumption, err *Error)
	Schedule Schedule
}

// Cache has the newest credentials of each assumption that a pod of this node uses.
//
// Each assumption has at most one call to STS at a time, a flight. A flight has its own context, so a
// client that hangs up does not cancel it for the others. Credentials with a holder are prefetched,
// renewed in the background, and removed with the last holder.
type Cache struct {
	sts      Assumer
	log      *slog.Logger
	observer Observer
	failed   func(holder string, a roles.Assumption, err *Error)
	schedule Schedule
	limiter  *Limiter

	flightContext context.Context // the parent of the flights' contexts; ends with Run
	cancelFlights context.CancelFunc
	flights       sync.WaitGroup
	wake          chan struct{} // makes Run sweep

	mu      sync.Mutex
	closed  bool
	entries map[roles.Assumption]*entry
	holders map[string]*holder   // by the pod's UID
	slowed  map[string]time.Time // by pod: until when its failures do not lower the node's rate again
	queue
}

// entry is the state of one assumption. The cache's mutex guards it.
type entry struct {
	document     *Document     // nil until the first success
	minRemaining time.Duration // with less remaining, a request first tries to renew it
	renewAt      time.Time     // when Run starts the next flight; zero for never
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

// New returns an empty cache.
func New(sts Assumer, c Config) *Cache {
	ctx, cancel := context.WithCancel(context.Background())
	if c.Observer == nil {
		c.Observer = discardObserver{}
	}
	if c.Failed == nil {
		c.Failed = func(string, roles.Assumption, *Error) {}
	}
	return &Cache{
		sts: sts, log: c.Log, observer: c.Observer, failed: c.Failed, schedule: c.Schedule, limiter: NewLimiter(time.Now()),
		flightContext: ctx, cancelFlights: cancel, wake: make(chan struct{}, 1),
		entries: make(map[roles.Assumption]*entry), holders: make(map[string]*holder), slowed: make(map[string]time.Time),
		queue: queue{requesters: make(map[string]*requester)},
	}
}

type discardObserver struct{}

func (discardObserver) Assumed(string, time.Duration) {}
func (discardObserver) Asked(bool)                    {}

// Get returns credentials for a client of the pod with this UID: cached ones if they remain valid for
// long enough, else those of a flight. If STS fails, it returns cached ones that are still valid. The
// error is an *Error, ErrClosed, that of ctx, or that the pod has since requested another assumption.
func (c *Cache) Get(ctx context.Context, pod string, a roles.Assumption) (*Document, error) {
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.entry(a)
	if e == nil {
		c.observer.Asked(false)
		return nil, &Error{Kind: Throttled, Code: "TooManyAssumptions", Message: "the pods of this node use more assumptions than this proxy keeps"}
	}
	e.idleUntil, e.pod = now.Add(idleLifetime), pod
	isFresh := e.document != nil && e.document.expiration.Sub(now) >= e.minRemaining
	if isFresh || e.err != nil && now.Before(e.errUntil) {
		c.observer.Asked(true)
		return e.result(now)
	}
	f := c.launch(a, e)
	if f == nil {
		return e.resultOr(ErrClosed, now)
	}
	c.observer.Asked(false)
	return c.wait(ctx, pod, f, now)
}

// wait waits for the flight and returns the result. The mutex is held, and released while it waits.
func (c *Cache) wait(ctx context.Context, pod string, f *flight, now time.Time) (*Document, error) {
	var superseded <-chan struct{}
	if f.waiting++; f.queued {
		superseded = c.enqueue(pod, f, now).superseded
		if c.dispatch(now) != never {
			c.wakeUp() // Run dispatches next
		}
	}
	var timeout <-chan time.Time
	if f.entry.isValid(now) {
		t := time.NewTimer(patience)
		defer t.Stop()
		timeout = t.C
	}
	c.mu.Unlock()
	var err error
	select {
	case <-f.done:
	case <-superseded:
		err = errSuperseded
	case <-timeout:
	case <-ctx.Done():
		err = ctx.Err()
	}
	c.mu.Lock()
	if f.dropped { // by close
		err = ErrClosed
	}
	f.waiting--
	c.dropUnused(f)
	if err != nil {
		return f.entry.resultOr(err, time.Now())
	}
	return f.entry.result(time.Now())
}

func (e *entry) isValid(now time.Time) bool {
	return e.document != nil && e.document.expiration.After(now)
}

// result returns the credentials while they are valid, else the last error.
func (e *entry) result(now time.Time) (*Document, error) {
	if e.err != nil {
		return e.resultOr(e.err, now)
	}
	return e.resultOr(&Error{Kind: Unavailable, Code: "Expired", Message: "the credentials ended and STS has not answered"}, now)
}

// resultOr returns the credentials while they are valid, else err.
func (e *entry) resultOr(err error, now time.Time) (*Document, error) {
	if e.isValid(now) {
		return e.document, nil
	}
	return nil, err
}

// entry returns the assumption's entry, a new one if needed, or nil if the cache is full. The mutex is
// held.
func (c *Cache) entry(a roles.Assumption) *entry {
	e := c.entries[a]
	if e == nil {
		if len(c.entries) >= maxEntries && !c.evict() {
			return nil
		}
		e = new(entry)
		c.entries[a] = e
	}
	return e
}

// evict removes the least recently requested entry without holder and flight. It returns false if there
// is none. The mutex is held.
func (c *Cache) evict() bool {
	var oldest roles.Assumption
	var found *entry
	for a, e := range c.entries {
		if e.holders == 0 && e.flight == nil && (found == nil || e.idleUntil.Before(found.idleUntil)) {
			oldest, found = a, e
		}
	}
	delete(c.entries, oldest)
	return found != nil
}

// Len returns the number of entries.
func (c *Cache) Len() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.entries)
}

// Failure returns the error of the last call to STS for the assumption, or nil if it succeeded or there
// was none.
func (c *Cache) Failure(a roles.Assumption) *Error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e := c.entries[a]; e != nil {
		return e.err
	}
	return nil
}
