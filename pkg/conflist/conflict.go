package conflist

import (
	"errors"
	"fmt"
	"slices"
	"time"
)

// ErrConflict is the error of a network configuration that another program keeps changing back.
var ErrConflict = errors.New("another program removes the entry from")

// A conflict begins when the entry is added to one text more than maxAdditions times within
// conflictWindow: at first, and after three removals. Then the installer leaves that text alone, and
// tries again after a time that doubles from minBackoff to maxBackoff. An upgrade of the primary CNI
// writes another text, which gets the entry immediately. Two other programs can alternate between
// texts, so the additions to all texts are limited as well: after them the file is left alone
// whatever its text is.
const (
	maxAdditions    = 4
	maxAllAdditions = 50
	conflictWindow  = 10 * time.Second
	minBackoff      = 10 * time.Second
	maxBackoff      = 5 * time.Minute
)

// conflict counts how often the entry was added.
type conflict struct {
	added   []addition // those of the last conflictWindow
	backoff time.Duration
	until   time.Time
	path    string // of the file that is left alone until then
	text    string // its text, or "" for any
	err     error
}

type addition struct {
	at   time.Time
	text string
}

// observe records that the entry was added to c, and reports whether another program is in conflict
// with the installer.
func (x *conflict) observe(now time.Time, c *config, name string) bool {
	text, isRetry := string(c.list.Bytes), x.backoff > 0
	x.added = slices.DeleteFunc(x.added, func(a addition) bool { return now.Sub(a.at) > conflictWindow })
	x.added = append(x.added, addition{now, text})
	same := 0
	for _, a := range x.added {
		if a.text == text {
			same++
		}
	}
	switch {
	case len(x.added) > maxAllAdditions:
		text = ""
	case same > maxAdditions, isRetry && same > 1: // a retry was undone
	default:
		return false
	}
	x.backoff = min(max(2*x.backoff, minBackoff), maxBackoff)
	x.until, x.path, x.text, x.added = now.Add(x.backoff), c.path, text, nil
	x.err = fmt.Errorf("%w %s: %s", ErrConflict, c.path, remedy(c, name))
	return true
}

// waits returns the conflict's error if c is to be left alone now, else nil. It ends a conflict if the
// entry has stayed for the window since the retry.
func (x *conflict) waits(now time.Time, c *config) error {
	if now.Before(x.until) && c.path == x.path && (x.text == "" || x.text == string(c.list.Bytes)) {
		return x.err
	}
	if x.backoff > 0 && len(x.added) > 0 && now.Sub(x.added[len(x.added)-1].at) > conflictWindow {
		x.backoff = 0
	}
	return nil
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
