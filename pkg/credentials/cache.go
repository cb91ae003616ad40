package credentials

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
)

// Assumer gets credentials from where they are made. An error should be an *Error; any other counts as Unavailable.
type Assumer interface {
	AssumeRole(ctx context.Context, a roles.Assumption) (*Credentials, error)
}

// Observer is told what the cache does; its methods must not block.
type Observer interface {
	// Assumed is one finished call to STS; the outcome is "ok" or the name of the error's Kind.
	Assumed(outcome string, took time.Duration)
	// Asked is one request for credentials, a hit where it did not wait for STS.
	Asked(hit bool)
}

// Cache keeps the newest credentials of every assumption that a pod of this node uses.
//
// For each assumption there is at most one call to STS at a time, a flight, with a context of its own: whoever waits for
// it may leave without harming those who stay. What a holder holds is fetched ahead and renewed in the background for as
// long as it is held, and forgotten with its last holder.
type Cache struct {
	sts      Assumer
	log      *slog.Logger
	observer Observer
	failure  func(holder string, a roles.Assumption, err *Error)
	schedule Schedule
	pace     *Pace

	life   context.Context // that of every flight
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

// hold is what a holder holds.
type hold struct {
	holding    bool
	assumption roles.Assumption
	next       time.Time // until when what it changes to is not fetched ahead
}

// entry is what is known of one assumption. The cache's mutex guards it.
type entry struct {
	document *Document     // nil until the first success
	low      time.Duration // what must remain for it to be handed out without a try to renew
	renewAt  time.Time     // when Run starts the next flight; zero for never
	err      *Error        // of the last flight, nil after a success
	errUntil time.Time     // until then err answers in place of a flight
	failures int           // in a row
	flight   *flight       // queued, or a call on its way; nil for none
	pod      string        // the last one that asked for it or began to hold it
	holders  int
	keep     time.Time // until when it stays where nobody holds it; zero where nobody ever asked
}

// Config is the cache's dependencies and settings.
type Config struct {
	Log *slog.Logger
	// Observer may be nil.
	Observer Observer
	// Failed is called after a failed flight for each holder of what it was for, once whoever waits has been answered. It may be nil.
	Failed   func(holder string, a roles.Assumption, err *Error)
	Schedule Schedule
}

const (
	// unheld is how long credentials that no pod holds are kept after they were last asked for, and imported how long those of
	// another proxy are: the pods may be long in coming.
	unheld, imported = time.Minute, 10 * time.Minute
	// changeEvery is how often a holder's changes are fetched ahead. What it asks for in between is fetched for it all the same.
	changeEvery = 30 * time.Second
	// maxEntries bounds the cache. A node has at most a few hundred pods.
	maxEntries = 4096
)

// New is an empty cache. Its Run must be running for credentials to be renewed.
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

// Get returns the document of the newest credentials for a client of the pod, which is given by its UID. It comes from the cache
// while it lasts long enough for every SDK, else from a flight, which may have to wait for the pod's turn. Where STS fails,
// credentials that are still valid are returned. The error is an *Error, ErrClosed, that of ctx, or
// says that the pod asked for another assumption first.
func (c *Cache) Get(ctx context.Context, pod string, a roles.Assumption) (*Document, error) {
	now := time.Now()
	c.mu.Lock()
	e := c.entry(a)
	if e == nil {
		c.mu.Unlock()
		c.observer.Asked(false)
		return nil, &Error{Kind: Throttled, Code: "TooManyAssumptions", Message: "more is asked for than this proxy keeps"}
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
	// Valid credentials are worth more than new ones: who could be served waits only for a moment.
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
	if f.dropped { // although clients wait
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

// answer is the credentials while they are valid, else the error that stands in their way. The mutex is held.
func (e *entry) answer(now time.Time) (*Document, error) {
	if e.document != nil && e.document.expiration.After(now) {
		return e.document, nil
	}
	if e.err != nil {
		return nil, e.err
	}
	return nil, &Error{Kind: Unavailable, Code: "Expired", Message: "the credentials ended and STS has not answered"}
}

// answerOr is the credentials while they are valid, else the error. The mutex is held.
func (e *entry) answerOr(err error, now time.Time) (*Document, error) {
	if d, invalid := e.answer(now); invalid == nil {
		return d, nil
	}
	return nil, err
}

// entry is that of the assumption, made where there is none; nil where there is no room. The mutex is held.
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

// evict makes room by dropping the entry that nobody holds and that was asked for longest ago. It is false where there is none. The mutex
// is held.
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

// Hold says that the holder, a pod's UID, uses the assumption from now on, in place of any other: it is fetched now and
// renewed until the holder lets go. Saying it again changes nothing. A holder that changes often is not fetched for each time.
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
		c.log.Warn("credentials are not kept: more are held than this proxy keeps", "role", a.RoleARN, "session", a.SessionName, "limit", maxEntries)
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

// fetch launches a flight for what a holder holds newly, or plans one. The mutex is held.
func (c *Cache) fetch(h *hold, a roles.Assumption, e *entry, now time.Time) {
	switch {
	case e.err != nil && now.Before(e.errUntil): // its next try has its time
	case now.Before(h.next):
		if e.renewAt.IsZero() || e.renewAt.After(h.next) {
			e.renewAt = h.next
		}
	default:
		// Two changes at once are somebody's mistake and its correction.
		h.next = later(h.next, now.Add(-changeEvery)).Add(changeEvery)
		c.fetchAhead(c.launch(a, e))
	}
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// Release says that the holder, which is still there, holds nothing any more. Credentials that nobody else holds go with it.
func (c *Cache) Release(holder string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if h := c.holds[holder]; h != nil {
		c.release(h)
	}
}

// Forget says that the holder is gone.
func (c *Cache) Forget(holder string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if h := c.holds[holder]; h != nil {
		c.release(h)
		delete(c.holds, holder)
	}
}

// Holders is how many are known to hold credentials, or to have held some.
func (c *Cache) Holders() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.holds)
}

// Len is how many assumptions something is known of.
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

// release has a holder hold nothing. The mutex is held.
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
	// A call that is on its way ends, and what it brings is not kept. One that is queued is made only if clients wait for it.
	e.keep = time.Time{}
	c.prune(f)
}

// settle gives the entry the outcome of its flight, and tells who is to hear of a failure.
func (c *Cache) settle(f *flight, creds *Credentials, failure *Error, now time.Time) (concerned []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	a, e := f.assumption, f.entry
	e.flight = nil
	c.callEnded(f)
	if failure != nil {
		c.slowDown(e.pod, failure, now)
		c.failed(a, e, failure, now)
		concerned = c.concerned(a, e, failure, now)
	} else {
		c.landed(a, e, creds, now)
	}
	if e.holders == 0 && e.keep.IsZero() {
		delete(c.entries, a) // everybody left during the call
	}
	c.stir()
	return concerned
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

// concerned returns the holders that are told of the failure. While a pod's credentials are valid, only a refusal of its own role
// concerns it: any other renewal is tried again in time. The mutex is held.
func (c *Cache) concerned(a roles.Assumption, e *entry, failure *Error, now time.Time) (holders []string) {
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
	// The newest credentials win: what STS made earlier never takes the place of what it made later.
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

// stir tells Run to look again.
func (c *Cache) stir() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}
