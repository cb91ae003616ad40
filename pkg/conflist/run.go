package conflist

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"github.com/fsnotify/fsnotify"
)

const (
	// unsettledInterval is the time until an unsettled file is read again.
	unsettledInterval = 100 * time.Millisecond
	// unsettledWarning is how long a file may be unsettled before that is an error.
	unsettledWarning = 10 * time.Second
)

// Run calls Install until ctx ends: at each change of the directories and at each interval. A
// primary CNI writes its configuration again at an upgrade and at a boot. Run logs changes and
// errors, and removes nothing at its end.
func (i *Installer) Run(ctx context.Context) error {
	watcher, err := fsnotify.NewWatcher()
	if err != nil { // the node's limit of inotify instances is reached
		i.Log.Warn("the kernel does not report changes of network configurations", "error", err)
		watcher = &fsnotify.Watcher{}
	} else {
		defer watcher.Close()
	}
	for {
		watched := err == nil
		for _, dir := range []string{i.ConfDir, i.BinDir} {
			// A directory may have been created or replaced since the last Add.
			watched = err == nil && watcher.Add(dir) == nil && watched
		}
		next := i.installAndLog()
		if !watched {
			next = min(next, time.Second)
		}
		if !i.wait(ctx, watcher, time.After(next)) {
			return nil
		}
	}
}

// wait waits for a change of the directories or the timer. It returns false when ctx ends.
func (i *Installer) wait(ctx context.Context, watcher *fsnotify.Watcher, timer <-chan time.Time) bool {
	for {
		select {
		case <-ctx.Done():
			return false
		case <-timer:
			return true
		case event := <-watcher.Events:
			if slices.Contains(extensions, filepath.Ext(event.Name)) || filepath.Base(event.Name) == i.Binary.Name || event.Name == filepath.Clean(i.ConfDir) {
				return true
			}
		case err := <-watcher.Errors:
			i.Log.Warn("watching network configurations", "error", err)
			return true
		}
	}
}

// installAndLog calls Install, reports its result, and returns the time until the next call.
func (i *Installer) installAndLog() time.Duration {
	changes, err := i.Install()
	if len(changes) > 0 {
		i.Log.Info("installed", "did", changes)
	}
	if !errors.Is(err, ErrUnsettled) {
		i.unsettled = time.Time{}
		i.logState(fmt.Sprint(err), err)
		i.Installed(err)
		return i.Interval
	}
	now := time.Now()
	if i.unsettled.IsZero() {
		i.unsettled = now
	}
	if now.Sub(i.unsettled) < unsettledWarning {
		i.logState(fmt.Sprint(err), err) // the last result stays valid
	} else {
		i.logState(unsettledTooLong, err) // the error can differ at each write
		i.Installed(err)
	}
	return unsettledInterval
}

// unsettledTooLong is the state of a file that has been unsettled for unsettledWarning.
const unsettledTooLong = "unsettled"

// logState logs the error of a state when the state begins.
func (i *Installer) logState(state string, err error) {
	if state == i.loggedState {
		return
	}
	i.loggedState = state
	switch {
	case err == nil:
		i.Log.Info("the plugin is chained")
	case state == unsettledTooLong:
		i.Log.Warn("a network configuration is written again and again: the plugin is not chained until that ends", "since", i.unsettled, "error", err)
	case errors.Is(err, ErrUnsettled):
		i.Log.Info("waiting until a network configuration is written", "error", err)
	case errors.Is(err, ErrNoNetwork):
		i.Log.Info("waiting for the primary CNI to write its network configuration", "error", err)
	case errors.Is(err, ErrConflict):
		i.Log.Error("waiting before the entry is added again; pods that start meanwhile are adopted", "wait", i.conflict.backoff, "error", err)
	case errors.Is(err, ErrNotChained):
		i.Log.Warn("the entry is missing: new pods get no credentials; chain it, or run the agent with --install", "error", err)
	default:
		i.Log.Error("the plugin is not chained: new pods get no credentials, and are not kept from the node's; trying again", "error", err)
	}
}
