package conflist

import (
	"errors"
	"fmt"
	"time"
)

// ErrConflict is the error of a network configuration that another program keeps changing back.
var ErrConflict = errors.New("another program removes the entry from")

// A conflict begins when the entry is added to the same text more than maxAdditions times within
// conflictWindow: at first, and after three removals. Then the installer leaves the file alone, and
// tries again after a time that doubles from minBackoff to maxBackoff. An upgrade of the primary
// CNI writes another text.
const (
	maxAdditions   = 4
	conflictWindow = 10 * time.Second
	minBackoff     = 10 * time.Second
	maxBackoff     = 5 * time.Minute
)

// conflict counts how often the entry was added to a text.
type conflict struct {
	text    string
	added   []time.Time // the last additions
	backoff time.Duration
	until   time.Time
	err     error // of the last conflict
}

// observe records that the entry was added to c, and reports whether another program is in conflict
// with the installer.
func (x *conflict) observe(now time.Time, c *config, name string) bool {
	if text := string(c.list.Bytes); text != x.text {
		*x = conflict{text: text}
	}
	isRetry := x.backoff > 0
	x.added = append(x.added, now)
	for len(x.added) > 0 && now.Sub(x.added[0]) > conflictWindow {
		x.added = x.added[1:]
	}
	switch {
	case isRetry && len(x.added) > 1: // removed soon after a retry
	case len(x.added) > maxAdditions:
	default:
		return false
	}
	x.backoff = min(max(2*x.backoff, minBackoff), maxBackoff)
	x.until, x.added = now.Add(x.backoff), nil
	x.err = fmt.Errorf("%w %s: %s", ErrConflict, c.path, remedy(c, name))
	return true
}

// settle ends a conflict if the entry has stayed for the window since the retry.
func (x *conflict) settle(now time.Time) {
	if x.backoff > 0 && len(x.added) > 0 && now.Sub(x.added[len(x.added)-1]) > conflictWindow {
		x.backoff = 0
	}
}

// remedy names the program that writes a configuration, by the plugins of its chain, and the
// setting that makes it leave the entry alone.
func remedy(c *config, name string) string {
	if c.has("cilium-cni") {
		return "set cni.exclusive=false in Cilium's values, or put the entry into Cilium's cni.configMap"
	}
	for _, plugin := range c.list.Plugins {
		if plugin.Network.Type != name {
			return fmt.Sprintf("find the program that writes the configuration of %s, and have it keep the entry", plugin.Network.Type)
		}
	}
	return "find the program that writes it"
}
