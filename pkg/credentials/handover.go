package credentials

import (
	"bytes"
	"encoding/json"
	"fmt"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
)

// importLifetime is how long imported credentials are kept without a holder. The API server may
// take minutes to list the pods.
const importLifetime = 10 * time.Minute

// exportedEntry is an assumption with its credentials. It contains secrets.
type exportedEntry struct {
	Assumption   roles.Assumption
	Document     []byte
	LastModified string
	Expiration   time.Time
	RenewAt      time.Time
}

// Export returns the held credentials for the proxy that replaces this one. With them, that proxy
// need not call STS. The result contains secrets, and only that proxy may receive it.
func (c *Cache) Export() ([]byte, error) {
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	all := make([]exportedEntry, 0, len(c.entries))
	for a, e := range c.entries {
		if e.holders > 0 && e.remaining(now) > 0 {
			all = append(all, exportedEntry{a, e.document.body, e.document.lastModified[0], e.document.expiration, e.renewAt})
		}
	}
	return json.Marshal(all)
}

// Import adds the credentials of another proxy's Export and returns how many it added. It does not
// replace credentials that expire later. An unknown field is an error: it may be a parameter of
// AssumeRole that this version lacks, and without it two assumptions would have the same key.
func (c *Cache) Import(exported []byte) (int, error) {
	var all []exportedEntry
	decoder := json.NewDecoder(bytes.NewReader(exported))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&all); err != nil {
		// The text of the error may contain a part of the input, which is secret.
		return 0, fmt.Errorf("credentials of another proxy: %T", err)
	}
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	imported := 0
	for _, x := range all {
		if c.importEntry(x, now) {
			imported++
		}
	}
	c.wakeUp()
	return imported, nil
}

// importEntry adds the credentials if they are valid, and reports whether it added them. The mutex
// is held.
func (c *Cache) importEntry(x exportedEntry, now time.Time) bool {
	lifetime := x.Assumption.Duration
	if lifetime <= 0 || !x.Expiration.After(now) || x.Expiration.Sub(now) > lifetime+time.Minute || !json.Valid(x.Document) {
		return false
	}
	e := c.entry(x.Assumption)
	if e == nil || e.document != nil && !x.Expiration.After(e.document.expiration) {
		return false
	}
	e.document, e.minRemaining = documentOf(x.Document, x.LastModified, x.Expiration), scaled(minRemaining, lifetime)
	e.idleUntil, e.renewAt = now.Add(importLifetime), x.RenewAt
	return true
}
