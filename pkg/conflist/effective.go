package conflist

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

var (
	// ErrNoNetwork is the error of a directory without a valid network configuration: the primary CNI
	// has not written its own yet.
	ErrNoNetwork = errors.New("no network configuration yet")
	// ErrUnsettled is the error of an invalid file that was written a moment ago: its writer may not
	// be done.
	ErrUnsettled = errors.New("being written")
)

// settleTime is how long an invalid file counts as being written.
const settleTime = 2 * time.Second

// observation is when an invalid file was first read with its present content.
type observation struct {
	info fs.FileInfo
	time time.Time
}

// effective returns the configuration that container runtimes use: the first valid one in the order of
// the file names. It skips generated lists unless the installer only watches. The error wraps
// ErrNoNetwork, or ErrUnsettled if an invalid file before it was written a moment ago.
func (i *Installer) effective(now time.Time) (*file, error) {
	entries, err := os.ReadDir(i.ConfDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("network configurations: %w", err)
	}
	var invalid []error
	defer func() { i.logInvalid(errors.Join(invalid...)) }()
	for _, e := range entries {
		if e.IsDir() || !isConfig(e.Name()) || !i.WatchOnly && isGenerated(e.Name(), i.Binary.Name) {
			continue
		}
		f, err := readConfig(filepath.Join(i.ConfDir, e.Name()))
		if err == nil {
			clear(i.invalid)
			return f, nil
		}
		if errors.Is(err, fs.ErrNotExist) {
			continue // renamed since ReadDir
		}
		if f != nil && i.isUnsettled(f, now) {
			return nil, fmt.Errorf("%s: %w: %w", e.Name(), ErrUnsettled, err)
		}
		invalid = append(invalid, fmt.Errorf("network configuration %s: %w", e.Name(), err))
	}
	return nil, fmt.Errorf("%w in %s", ErrNoNetwork, i.ConfDir)
}

// isUnsettled reports whether an invalid file was written less than settleTime ago. The modification
// time alone would not do: after a change of the clock it can be in the future.
func (i *Installer) isUnsettled(f *file, now time.Time) bool {
	if now.Sub(f.info.ModTime()) >= settleTime {
		return false
	}
	first, ok := i.invalid[f.path]
	if !ok || !isUnchanged(f.info, first.info) {
		first = observation{f.info, now}
		if i.invalid == nil {
			i.invalid = make(map[string]observation)
		}
		i.invalid[f.path] = first
	}
	return now.Sub(first.time) < settleTime
}

func (i *Installer) logInvalid(err error) {
	text := ""
	if err != nil {
		text = err.Error()
	}
	if text != "" && text != i.loggedInvalid {
		i.Log.Warn("network configurations that runtimes pass over", "error", err)
	}
	i.loggedInvalid = text
}
