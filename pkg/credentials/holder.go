package credentials

import (
	"time"

	"golang.org/x/time/rate"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
)

// changeInterval and changeBurst limit how often a holder's changed assumption is prefetched. The
// burst suffices for a mistake and its correction. Without a prefetch, the first request for the
// assumption calls STS.
const changeInterval, changeBurst = 30 * time.Second, 2

// holder is a pod and the assumption that it holds.
type holder struct {
	assumption roles.Assumption
	entry      *entry // of the assumption; nil if the pod holds none
	prefetches *rate.Limiter
}

// Hold makes the pod with this UID hold the assumption in place of its former one. Held credentials
// are prefetched and renewed.
func (c *Cache) Hold(pod string, a roles.Assumption) {
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	h := c.holders[pod]
	isNew := h == nil
	if isNew {
		h = &holder{prefetches: rate.NewLimiter(rate.Every(changeInterval), changeBurst)}
		c.holders[pod] = h
	}
	if h.entry != nil && h.assumption == a {
		return
	}
	c.release(h)
	e := c.entry(a)
	if e == nil {
		c.Log.Warn("credentials are not kept: the pods of this node hold more assumptions than this proxy keeps", "role", a.RoleARN, "session", a.SessionName, "limit", maxEntries)
		return
	}
	h.assumption, h.entry, e.pod = a, e, pod
	if e.holders++; e.holders == 1 {
		c.limiter.AddHolder(a.Duration, isNew)
	}
	if e.document == nil && !now.Before(e.errUntil) {
		if at := now.Add(take(h.prefetches, now)); e.renewAt.IsZero() || at.Before(e.renewAt) {
			e.renewAt = at
		}
	}
	c.wakeUp()
}

// Release ends the pod's use of its assumption. Credentials without a holder are removed.
func (c *Cache) Release(pod string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.release(c.holders[pod])
}

// Forget releases the pod's assumption and forgets how often the pod changed it.
func (c *Cache) Forget(pod string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.release(c.holders[pod])
	delete(c.holders, pod)
}

// release ends the holder's use of its assumption, if there is one. The mutex is held.
func (c *Cache) release(h *holder) {
	if h == nil || h.entry == nil {
		return
	}
	a, e := h.assumption, h.entry
	h.entry = nil
	if e.holders--; e.holders > 0 {
		return
	}
	c.limiter.RemoveHolder(a.Duration)
	if e.flight == nil {
		delete(c.entries, a)
		return
	}
	// A running call completes, and sweep then removes the entry. A queued call is made only if
	// clients wait for it.
	e.idleUntil = time.Time{}
	c.dropUnused(e.flight)
}
