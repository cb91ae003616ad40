package conflist

import (
	"context"
	"errors"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"
)

const (
	// unsettledInterval is the time until an unsettled file is read again.
	unsettledInterval = 100 * time.Millisecond
	// unsettledWarning is how long a file is unsettled before a warning.
	unsettledWarning = 10 * time.Second
)

// Run calls Install until ctx ends: at each change of the directories and at each interval. A primary
// CNI writes its configuration again at an upgrade and at a boot. Run logs changes and errors, and
// removes nothing at its end.
func (i *Installer) Run(ctx context.Context) error {
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		i.Log.Warn("the kernel does not report changes of network configurations", "interval", i.Interval, "error", err)
		watcher = &fsnotify.Watcher{}
	} else {
		defer watcher.Close()
	}
	dirs := []string{i.ConfDir}
	if !i.WatchOnly {
		dirs = append(dirs, i.BinDir)
	}
	for {
		watched := true
		if err == nil {
			// A directory may have been created or replaced since the last Add.
			for _, dir := range dirs {
				watched = watcher.Add(dir) == nil && watched
			}
		}
		next := i.installAndLog()
		if !watched {
			next = min(next, time.Second)
		}
		timer := time.NewTimer(next)
		for waiting := true; waiting; {
			select {
			case <-ctx.Done():
				timer.Stop()
				return nil
			case <-timer.C:
				waiting = false
			case event := <-watcher.Events:
				waiting = !i.isRelevant(event)
			case err := <-watcher.Errors:
				i.Log.Warn("watching network configurations", "error", err)
				waiting = false
			}
		}
		timer.Stop()
	}
}

func (i *Installer) isRelevant(event fsnotify.Event) bool {
	if filepath.Dir(event.Name) == filepath.Clean(i.BinDir) {
		return filepath.Base(event.Name) == i.Binary.Name
	}
	return isConfig(event.Name) || event.Name == filepath.Clean(i.ConfDir)
}

// installAndLog calls Install, logs changes of its result, and returns the time until the next call.
func (i *Installer) installAndLog() time.Duration {
	changes, err := i.Install()
	if len(changes) > 0 {
		i.Log.Info("installed", "did", changes)
	}
	if errors.Is(err, ErrUnsettled) {
		if now := time.Now(); i.unsettled.IsZero() {
			i.unsettled = now
		} else if now.Sub(i.unsettled) > unsettledWarning {
			i.Log.Warn("a network configuration has been changing for a while; nothing is chained until it stays as it is", "error", err)
			i.unsettled = now
		}
		return unsettledInterval // the last result stays valid
	}
	next, state := i.Interval, ""
	if errors.Is(err, ErrNoNetwork) {
		next = min(i.Interval, time.Second)
	}
	if err != nil {
		state = err.Error()
	}
	if state != i.loggedState {
		switch {
		case err == nil:
			i.Log.Info("the plugin is chained")
		case errors.Is(err, ErrNoNetwork):
			i.Log.Info("waiting for the primary CNI to write its network configuration", "directory", i.ConfDir)
		case errors.Is(err, ErrNotChained):
			i.Log.Warn("the entry is missing: new pods get no credentials; chain it, or run the agent with --install", "error", err)
		default:
			i.Log.Error("the plugin is not chained: new pods get no credentials, and are not kept from the node's; trying again", "error", err)
		}
	}
	i.loggedState, i.unsettled = state, time.Time{}
	if i.Installed != nil {
		i.Installed(err)
	}
	return next
}
