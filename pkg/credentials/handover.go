package credentials

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
)

// handed is one assumption with its credentials, for the proxy's successor. It holds secrets, and goes to a socket that only root can open.
type handed struct {
	Assumption   roles.Assumption
	Document     []byte
	LastModified string
	Expiration   time.Time
	RenewAt      time.Time
}

// Export returns the credentials of held assumptions for the proxy that replaces this one, so that it need not call STS for
// credentials that are valid for most of an hour. The result holds secrets and goes to that proxy only.
func (c *Cache) Export() ([]byte, error) {
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	all := make([]handed, 0, len(c.entries))
	for a, e := range c.entries {
		if e.holders > 0 && e.document != nil && e.document.expiration.After(now) {
			all = append(all, handed{a, e.document.body, e.document.lastModified[0], e.document.expiration, e.renewAt})
		}
	}
	return json.Marshal(all)
}

// Import adds the credentials of another proxy's Export, and returns their number. They are renewed when the other proxy would have
// renewed them. Those without a holder are forgotten after a while. Newer credentials are not replaced.
func (c *Cache) Import(exported []byte) (int, error) {
	var all []handed
	if err := json.Unmarshal(exported, &all); err != nil {
		return 0, fmt.Errorf("credentials of another proxy: %w", asJSONError(err))
	}
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	taken := 0
	for _, h := range all {
		lifetime := h.Assumption.Duration
		if lifetime <= 0 || !h.Expiration.After(now) || h.Expiration.Sub(now) > lifetime+time.Minute || !json.Valid(h.Document) {
			continue
		}
		e := c.entry(h.Assumption)
		if e == nil {
			continue
		}
		if e.document != nil && !h.Expiration.After(e.document.expiration) {
			continue
		}
		e.document, e.low = documentOf(h.Document, h.LastModified, h.Expiration), scaled(safe, lifetime)
		e.keep, e.renewAt = now.Add(imported), h.RenewAt
		if latest := h.Expiration.Add(-e.low); e.renewAt.IsZero() || e.renewAt.After(latest) {
			e.renewAt = latest
		}
		taken++
	}
	c.stir()
	return taken, nil
}

// asJSONError returns an error of encoding/json without its input, which holds secrets.
func asJSONError(err error) error {
	return fmt.Errorf("%T", err)
}

// Pending returns the number of held assumptions with neither credentials nor an error.
func (c *Cache) Pending() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	pending := 0
	for _, e := range c.entries {
		if e.holders > 0 && e.document == nil && e.err == nil {
			pending++
		}
	}
	return pending
}
