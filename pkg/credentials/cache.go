package credentials

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
)

// Assumer issues credentials. An error should be an *Error; any other counts as Unavailable.
type Assumer interface {
	AssumeRole(ctx context.Context, a roles.Assumption) (*Credentials, error)
}

// Observer counts what the cache does. Its methods must not block.
type Observer interface {
	// Assumed reports a finished call to STS; the outcome is "ok" or the name of the error's Kind.
	Assumed(outcome string, took time.Duration)
	// Asked reports a request for credentials. It is a hit if it did not wait for STS.
	Asked(hit bool)
}

// Cache keeps the newest credentials of every assumption that a pod of this node uses.
//
// For each assumption there is at most one call to STS at a time, a flight. It has a context of its own, so a client that
// hangs up does not end it for the others. The credentials of a held assumption are prefetched, renewed in the
// background, and forgotten with the last holder.
type Cache struct {
	sts      Assumer
	log      *slog.Logger
	observer Observer
	failure  func(holder string, a roles.Assumption, err *Error)
	schedule Schedule
	pace     *Pace

	life   context.Context // the parent of every flight's context
	end    context.CancelFunc
	wake   chan struct{}  // tells Run that the next deadline may have changed
	flying sync.WaitGroup // the flights

	mu      sync.Mutex
	closed  bool
	entries map[roles.Assumption]*entry
	holds   map[string]*hold     // by holder
	slowed  map[string]time.Time // by pod; until when its failures do not slow the node down again
	queue
}

// hold is a holder's assumption.
type hold struct {
	holding    bool
	assumption roles.Assumption
	next       time.Time // the earliest time of the next prefetch
}

// entry is the state of one assumption. The cache's mutex guards it.
type entry struct {
	document *Document     // nil until the first success
	low      time.Duration // with less remaining, it is not handed out without an attempt to renew it
	renewAt  time.Time     // when Run starts the next flight; zero for never
	err      *Error        // of the last flight, nil after a success
	errUntil time.Time     // until then, requests are answered with err and start no flight
	failures int           // in a row
	flight   *flight       // queued, or a call on its way; nil for none
	pod      string        // the last one that asked for it or began to hold it
	holders  int
	keep     time.Time // until then it stays without a holder; zero if no client has asked
}

// Config is the cache's dependencies and settings.
type Config struct {
	Log *slog.Logger
	// Observer may be nil.
	Observer Observer
	// Failed is called after a failed flight, for each holder of the assumption, after the waiting clients are answered. It may
	// be nil.
	Failed   func(holder string, a roles.Assumption, err *Error)
	Schedule Schedule
}

const (
	// unheld is how long credentials without a holder are kept after the last request for them, and imported the same for those
	// of another proxy, whose pods the API server may take minutes to list.
	unheld, imported = time.Minute, 10 * time.Minute
	// changeEvery is how often a holder's change is prefetched. A client's request in between still calls STS.
	changeEvery = 30 * time.Second
	// maxEntries bounds the cache. A node has at most a few hundred pods.
	maxEntries = 4096
)

// New returns an empty cache. Run renews its credentials.
func New(sts Assumer, c Config) *Cache {
	life, end := context.WithCancel(context.Background())
	if c.Observer == nil {
		c.Observer = unobserved{}
	}
	if c.Failed == nil {
		c.Failed = func(string, roles.Assumption, *Error) {}
	}
	return &Cache{
		sts: sts, log: c.Log, observer: c.Observer, failure: c.Failed, schedule: c.Schedule, pace: NewPace(time.Now()),
		life: life, end: end, wake: make(chan struct{}, 1),
		entries: make(map[roles.Assumption]*entry), holds: make(map[string]*hold), slowed: make(map[string]time.Time),
		queue: queue{requesters: make(map[string]*requester)},
	}
}

type unobserved struct{}

func (unobserved) Assumed(string, time.Duration) {}
func (unobserved) Asked(bool)                    {}

// ErrClosed is the error of a cache whose Run has ended.
var ErrClosed = errors.New("credentials: the proxy is shutting down")

// Get returns the document of the newest credentials for a client of the pod with this UID. It comes from the cache
// while it lasts long enough for every SDK, else from a flight, which may wait in the queue. If STS fails, Get returns
// credentials that are still valid. The error is an *Error, ErrClosed, that of ctx, or
// says that the pod asked for another assumption first.
func (c *Cache) Get(ctx context.Context, pod string, a roles.Assumption) (*Document, error) {
	now := time.Now()
	c.mu.Lock()
	e := c.entry(a)
	if e == nil {
		c.mu.Unlock()
		c.observer.Asked(false)
		return nil, &Error{Kind: Throttled, Code: "TooManyAssumptions", Message: "the pods of this node use more assumptions than this proxy keeps"}
	}
	e.keep, e.pod = now.Add(unheld), pod
	if e.document != nil && e.document.expiration.Sub(now) >= e.low {
		d := e.document
		c.mu.Unlock()
		c.observer.Asked(true)
		return d, nil
	}
	if e.err != nil && now.Before(e.errUntil) {
		d, err := e.answer(now)
		c.mu.Unlock()
		c.observer.Asked(true)
		return d, err
	}
	f := c.launch(a, e)
	if f == nil {
		defer c.mu.Unlock()
		return e.answerOr(ErrClosed, now)
	}
	var superseded <-chan struct{}
	if f.waiting++; f.queued {
		superseded = c.enqueue(pod, f, now).superseded
		if c.dispatch(now) != never {
			c.stir() // Run dispatches next
		}
	}
	valid := e.document != nil && e.document.expiration.After(now)
	c.mu.Unlock()
	c.observer.Asked(false)
	// A client that can be served with valid credentials waits for new ones for a moment only.
	var patience <-chan time.Time
	if valid {
		t := time.NewTimer(200 * time.Millisecond)
		defer t.Stop()
		patience = t.C
	}
	var err error
	select {
	case <-f.done:
	case <-superseded:
		err = errSuperseded
	case <-patience:
	case <-ctx.Done():
		err = ctx.Err()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if f.dropped { // by close, although clients wait
		err = ErrClosed
	}
	f.waiting--
	c.prune(f)
	if err != nil {
		return e.answerOr(err, time.Now())
	}
	return e.answer(time.Now())
}

// errSuperseded answers clients that wait for an assumption that their pod has since replaced.
var errSuperseded = errors.New("credentials: the pod's annotations changed before STS was asked")

// answer returns the credentials while they are valid, else the last error. The mutex is held.
func (e *entry) answer(now time.Time) (*Document, error) {
	if e.document != nil && e.document.expiration.After(now) {
		return e.document, nil
	}
	if e.err != nil {
		return nil, e.err
	}
	return nil, &Error{Kind: Unavailable, Code: "Expired", Message: "the credentials ended and STS has not answered"}
}

// answerOr returns the credentials while they are valid, else err. The mutex is held.
func (e *entry) answerOr(err error, now time.Time) (*Document, error) {
	if d, invalid := e.answer(now); invalid == nil {
		return d, nil
	}
	return nil, err
}

// entry returns the assumption's entry, a new one if there is none, or nil if the cache is full. The mutex is held.
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

// evict drops the least recently requested entry without a holder or a flight. It returns false if there is none. The
// mutex is held.
func (c *Cache) evict() bool {
	var oldest roles.Assumption
	var found *entry
	for a, e := range c.entries {
		if e.holders == 0 && e.flight == nil && (found == nil || e.keep.Before(found.keep)) {
			oldest, found = a, e
		}
	}
	delete(c.entries, oldest)
	return found != nil
}

// Hold makes the assumption the one that the holder, a pod's UID, uses: it is prefetched now and renewed until the holder
// is released or holds another. A repeated call changes nothing. If a holder changes often, not each change is prefetched.
func (c *Cache) Hold(holder string, a roles.Assumption) {
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	h := c.holds[holder]
	fresh := h == nil
	if fresh {
		h = new(hold)
		c.holds[holder] = h
	}
	if h.holding && h.assumption == a {
		return
	}
	c.release(h)
	e := c.entry(a)
	if e == nil {
		c.log.Warn("credentials are not kept: the pods of this node hold more assumptions than this proxy keeps", "role", a.RoleARN, "session", a.SessionName, "limit", maxEntries)
		return
	}
	h.holding, h.assumption, e.pod = true, a, holder
	if e.holders++; e.holders == 1 {
		c.pace.Hold(now, a.Duration)
		if fresh {
			c.pace.Bring(now)
		}
	}
	if e.document == nil {
		c.fetch(h, a, e, now)
	}
	c.stir()
}

// fetch launches a flight for the holder's new assumption, or schedules one. The mutex is held.
func (c *Cache) fetch(h *hold, a roles.Assumption, e *entry, now time.Time) {
	switch {
	case e.err != nil && now.Before(e.errUntil): // the next attempt is scheduled
	case now.Before(h.next):
		if e.renewAt.IsZero() || e.renewAt.After(h.next) {
			e.renewAt = h.next
		}
	default:
		// Two changes in a row are allowed: a mistake and its correction.
		h.next = later(h.next, now.Add(-changeEvery)).Add(changeEvery)
		c.enqueueBackground(c.launch(a, e))
	}
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// Release ends the holder's use of its assumption. Credentials without another holder are forgotten.
func (c *Cache) Release(holder string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if h := c.holds[holder]; h != nil {
		c.release(h)
	}
}

// Forget releases the holder and forgets it.
func (c *Cache) Forget(holder string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if h := c.holds[holder]; h != nil {
		c.release(h)
		delete(c.holds, holder)
	}
}

// Holders returns the number of holders that are not forgotten.
func (c *Cache) Holders() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.holds)
}

// Len returns the number of entries.
func (c *Cache) Len() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.entries)
}

// Failure returns the error of the last call to STS for the assumption. It is nil after a success, and while STS has not answered yet.
func (c *Cache) Failure(a roles.Assumption) *Error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e := c.entries[a]; e != nil {
		return e.err
	}
	return nil
}

// release ends the holder's use of its assumption. The mutex is held.
func (c *Cache) release(h *hold) {
	if !h.holding {
		return
	}
	a := h.assumption
	h.holding, h.assumption = false, roles.Assumption{}
	e := c.entries[a]
	if e.holders--; e.holders > 0 {
		return
	}
	c.pace.LetGo(time.Now(), a.Duration)
	f := e.flight
	if f == nil {
		delete(c.entries, a)
		return
	}
	// A running call ends, and its result is not kept. A queued one is made only if clients wait for it.
	e.keep = time.Time{}
	c.prune(f)
}

// settle stores the outcome of the flight in its entry, and returns the holders to notify of a failure.
func (c *Cache) settle(f *flight, creds *Credentials, failure *Error, now time.Time) (holders []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	a, e := f.assumption, f.entry
	e.flight = nil
	c.callEnded(f)
	if failure != nil {
		c.slowDown(e.pod, failure, now)
		c.failed(a, e, failure, now)
		holders = c.holdersToNotify(a, e, failure, now)
	} else {
		c.landed(a, e, creds, now)
	}
	if e.holders == 0 && e.keep.IsZero() {
		delete(c.entries, a) // the last holder left during the call
	}
	c.stir()
	return holders
}

// slowDown slows the node's calls down after a failure, at most once in recovery for each pod. A pod that changes its
// annotations all the time would otherwise keep the node slow for its neighbours: each change is an assumption without a
// failure before it. The mutex is held.
func (c *Cache) slowDown(pod string, failure *Error, now time.Time) {
	if failure.Kind != Throttled && failure.Kind != Unavailable || now.Before(c.slowed[pod]) {
		return
	}
	c.slowed[pod] = now.Add(recovery)
	c.pace.Told(now, failure)
}

// holdersToNotify returns the holders of the assumption. While their credentials are valid, it returns them only if STS
// refuses the role: any other renewal is tried again in time. The mutex is held.
func (c *Cache) holdersToNotify(a roles.Assumption, e *entry, failure *Error, now time.Time) (holders []string) {
	refused := failure.Kind == Denied || failure.Kind == Malformed
	if !refused && e.document != nil && e.document.expiration.After(now) {
		return nil
	}
	for holder, h := range c.holds {
		if h.holding && h.assumption == a {
			holders = append(holders, holder)
		}
	}
	return holders
}

func (c *Cache) landed(a roles.Assumption, e *entry, creds *Credentials, now time.Time) {
	e.err, e.errUntil, e.failures = nil, time.Time{}, 0
	lifetime := creds.Expiration.Sub(now)
	left := time.Duration(-1)
	if e.document != nil {
		left = e.document.expiration.Sub(now)
	}
	e.renewAt = c.schedule.Renewal(creds.Expiration, lifetime, left)
	// Credentials that end earlier never replace those that end later.
	if e.document == nil || creds.Expiration.After(e.document.expiration) {
		e.document, e.low = newDocument(creds), scaled(safe, lifetime)
	}
	c.log.Debug("credentials obtained", "role", a.RoleARN, "session", a.SessionName, "expiration", creds.Expiration)
}

func (c *Cache) failed(a roles.Assumption, e *entry, err *Error, now time.Time) {
	e.failures++
	e.err = err
	e.errUntil = now.Add(c.schedule.Remember(err.Kind, e.failures))
	e.renewAt = now.Add(c.schedule.RetryAfter(err.Kind, e.failures))
	if c.life.Err() == nil {
		c.log.Warn("credentials not obtained", "role", a.RoleARN, "session", a.SessionName, "kind", err.Kind.String(),
			"code", err.Code, "message", err.Message, "failures", e.failures)
	}
}

// stir makes Run sweep.
func (c *Cache) stir() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}
