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
	// ErrNoNetwork is the error of a directory without a network configuration: the primary CNI has not written its own yet.
	ErrNoNetwork = errors.New("no network configuration yet")
	// ErrUnsettled is the error of a file that is being written: it says nothing for a moment.
	ErrUnsettled = errors.New("being written")
)

// settle is how long a file that makes no sense may still be being written.
const settle = 2 * time.Second

// file is a network configuration as it stood when it was read.
type file struct {
	path string
	info fs.FileInfo
	text []byte
	network
	// lone is one plugin's own configuration (.conf, .json), which is a whole network.
	lone bool
}

// settling remembers files that make no sense, by their path, and when each was first seen as it is.
type settling map[string]seen

type seen struct {
	info  fs.FileInfo
	since time.Time
}

// wait tells whether a file that makes no sense is given time still: it was written just now, and has not been seen as it is for long. Its
// own word for when it was written is not enough: clocks are set.
func (s settling) wait(f *file, now time.Time) bool {
	if now.Sub(f.info.ModTime()) >= settle {
		return false
	}
	was, ok := s[f.path]
	if !ok || !unchanged(f.info, was.info) {
		was = seen{f.info, now}
		s[f.path] = was
	}
	return now.Sub(was.since) < settle
}

// effective is the configuration that container runtimes take for a pod's network, where skip passes over none that is a runtime's to read:
// in the order of the files' names the first that makes sense. Those before it that make none are in broken. The error wraps
// ErrNoNetwork, or ErrUnsettled where one of them was written just now.
func effective(dir string, skip func(name string) bool, s settling, now time.Time) (f *file, broken error, err error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, nil, fmt.Errorf("network configurations: %w", err)
	}
	var wrong []error
	for _, e := range entries {
		if e.IsDir() || !isConfig(e.Name()) || skip(e.Name()) {
			continue
		}
		f, err := read(filepath.Join(dir, e.Name()))
		if err == nil {
			clear(s)
			return f, errors.Join(wrong...), nil
		}
		if errors.Is(err, fs.ErrNotExist) {
			continue // it was renamed away
		}
		if f != nil && s.wait(f, now) {
			return nil, nil, fmt.Errorf("%s: %w: %w", e.Name(), ErrUnsettled, err)
		}
		wrong = append(wrong, fmt.Errorf("network configuration %s: %w", e.Name(), err))
	}
	return nil, errors.Join(wrong...), fmt.Errorf("%w in %s", ErrNoNetwork, dir)
}

func isConfig(name string) bool {
	switch filepath.Ext(name) {
	case ".conflist", ".conf", ".json":
		return true
	}
	return false
}

// read reads a configuration as a runtime does (containerd, pkg/cri: those that end in .conflist as lists, the others as a plugin's).
// The file comes with the error where it is there and makes no sense.
func read(path string) (*file, error) {
	f := &file{path: path, lone: filepath.Ext(path) != ".conflist"}
	var err error
	if f.info, err = os.Stat(path); err != nil {
		return nil, err
	}
	if f.text, err = Contents(path); err != nil {
		return f, err
	}
	if f.lone {
		f.network, err = parseLone(f.text)
		return f, err
	}
	if f.network, err = parseNetwork(f.text); err != nil {
		return f, err
	}
	more, err := f.folder()
	if err == nil && len(f.Plugins)+len(more) == 0 {
		err = errNoPlugins
	}
	return f, err
}

// folder are the plugins that stand in a directory beside it.
func (f *file) folder() ([]entry, error) { return f.network.folder(filepath.Dir(f.path)) }
