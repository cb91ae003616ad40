package credentials

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
)

// handed is what a proxy tells its successor of one assumption. It holds secrets, and is for a socket of root's alone.
type handed struct {
	Assumption   roles.Assumption
	Document     []byte
	LastModified string
	Expiration   time.Time
	RenewAt      time.Time
}

// Export is the credentials that pods of this node hold, for the proxy that takes this one's place: it need not ask STS for what is
// good for most of an hour. It is full of secrets, and is given to nobody else.
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

// Import takes over what another proxy's Export says, and tells how many credentials those are. They are renewed when the other
// would have renewed them; those that no pod holds are forgotten soon. The newest stay.
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

// asJSONError is an error of encoding/json without the text that it is about: that holds secrets.
func asJSONError(err error) error {
	return fmt.Errorf("%T", err)
}

// Pending is how many of the assumptions that pods hold have neither credentials nor an error yet.
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
