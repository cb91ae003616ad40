package credentials

import (
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
)

// changeInterval is how often a holder's new assumption is prefetched. Between prefetches, the first
// request for it calls STS.
const changeInterval = 30 * time.Second

// holder is a pod and the assumption that it holds.
type holder struct {
	holding      bool
	assumption   roles.Assumption
	nextPrefetch time.Time // the earliest time
}

// Hold makes the holder, a pod's UID, hold the assumption in place of its former one. Held credentials
// are prefetched and renewed.
func (c *Cache) Hold(id string, a roles.Assumption) {
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	h := c.holders[id]
	isNew := h == nil
	if isNew {
		h = new(holder)
		c.holders[id] = h
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
	h.holding, h.assumption, e.pod = true, a, id
	if e.holders++; e.holders == 1 {
		c.limiter.AddHolder(now, a.Duration, isNew)
	}
	if e.document == nil {
		c.prefetchFor(h, e, now)
	}
	c.wakeUp()
}

// prefetchFor launches or schedules a flight for the holder's new assumption. The mutex is held.
func (c *Cache) prefetchFor(h *holder, e *entry, now time.Time) {
	switch {
	case e.err != nil && now.Before(e.errUntil): // the next attempt is scheduled
	case now.Before(h.nextPrefetch):
		if e.renewAt.IsZero() || e.renewAt.After(h.nextPrefetch) {
			e.renewAt = h.nextPrefetch
		}
	default:
		// Two changes in a row are prefetched: a mistake and its correction.
		if earliest := now.Add(-changeInterval); h.nextPrefetch.Before(earliest) {
			h.nextPrefetch = earliest
		}
		h.nextPrefetch = h.nextPrefetch.Add(changeInterval)
		c.enqueueBackground(c.launch(h.assumption, e))
	}
}

// Release ends the holder's use of its assumption. Credentials without a holder are removed.
func (c *Cache) Release(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if h := c.holders[id]; h != nil {
		c.release(h)
	}
}

// Forget releases the holder and forgets when it last changed its assumption.
func (c *Cache) Forget(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if h := c.holders[id]; h != nil {
		c.release(h)
		delete(c.holders, id)
	}
}

// Holders returns the number of holders that are not forgotten.
func (c *Cache) Holders() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.holders)
}

// release ends the holder's use of its assumption. The mutex is held.
func (c *Cache) release(h *holder) {
	if !h.holding {
		return
	}
	a := h.assumption
	h.holding, h.assumption = false, roles.Assumption{}
	e := c.entries[a]
	if e.holders--; e.holders > 0 {
		return
	}
	c.limiter.RemoveHolder(time.Now(), a.Duration)
	if e.flight == nil {
		delete(c.entries, a)
		return
	}
	// A running call ends and its result is discarded. A queued call is made only if clients wait for it.
	e.idleUntil = time.Time{}
	c.dropUnused(e.flight)
}
