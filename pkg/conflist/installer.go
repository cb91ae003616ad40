package conflist

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync/atomic"
	"time"
)

// Installer installs a plugin's binary and adds its entry to the network configuration. It is not
// safe for concurrent use.
type Installer struct {
	ConfDir   string // of the network configurations
	BinDir    string // of the plugins' binaries
	Binary    Binary // its name is the plugin's type
	Entry     []byte // a JSON object with the plugin's "type"
	WatchOnly bool   // change nothing, and return ErrNotChained if the entry is missing
	// Interval is the time between two checks if the kernel reports no change.
	Interval time.Duration
	// Installed is called by Run with the result of each check.
	Installed func(error)
	Log       *slog.Logger

	loggedState string
	unsettled   time.Time // when Run first got ErrUnsettled without another result since, or zero
	conflict    conflict
	network     atomic.Pointer[string]
}

// Network returns the name of the network that the installer has last chained the plugin in, or "". It
// is safe for concurrent use.
func (i *Installer) Network() string {
	if name := i.network.Load(); name != nil {
		return *name
	}
	return ""
}

var (
	// ErrNoNetwork is the error of a directory without a valid network configuration: the primary
	// CNI has not written its own yet.
	ErrNoNetwork = errors.New("no network configuration yet")
	// ErrUnsettled is the error of a file that another program writes at this moment.
	ErrUnsettled = errors.New("being written")
	// ErrNotChained is the error of a network configuration without the plugin's entry.
	ErrNotChained = errors.New("the plugin is not in the chain of")
)

// Install installs the binary, and then adds the entry to the effective network configuration. It
// returns a line for each change. The error wraps ErrNoNetwork, ErrUnsettled, ErrNotChained,
// ErrConflict, or an error of the file system.
func (i *Installer) Install() (changes []string, err error) {
	now := time.Now()
	if i.WatchOnly {
		return nil, i.check(now)
	}
	path := filepath.Join(i.BinDir, i.Binary.Name)
	removeStale(path, now)
	installed, err := i.Binary.install(i.BinDir)
	if err != nil {
		return nil, fmt.Errorf("the plugin's program: %w", err)
	}
	if installed {
		changes = append(changes, "program "+path)
	}
	more, err := i.chain(now)
	return append(changes, more...), err
}

// effective returns the configuration that container runtimes use: the first valid one. It skips
// generated lists unless the installer only watches. The error wraps ErrUnsettled if an invalid
// file before it is unsettled. If there is none, the error wraps ErrNoNetwork and those of invalid
// files.
func (i *Installer) effective(now time.Time) (*config, error) {
	configs, err := readConfigs(i.ConfDir)
	if err != nil {
		return nil, err
	}
	err = fmt.Errorf("%w in %s", ErrNoNetwork, i.ConfDir)
	for _, c := range configs {
		if !i.WatchOnly && isGenerated(c.path, i.Binary.Name) {
			continue
		}
		if c.err == nil {
			return c, nil
		}
		if c.isUnsettled(now) {
			return nil, fmt.Errorf("%w: %w", ErrUnsettled, c.err)
		}
		err = fmt.Errorf("%w; %w", err, c.err)
	}
	return nil, err
}

// check returns ErrNotChained if the effective configuration does not have the plugin in its chain.
// Multus calls the plugins of another configuration of the directory.
func (i *Installer) check(now time.Time) error {
	c, err := i.effective(now)
	if err != nil || c.has(i.Binary.Name) {
		return err
	}
	if c.has("multus", "multus-shim") {
		if networks, err := Chained(i.ConfDir, i.Binary.Name); len(networks) > 0 {
			return nil
		} else if err != nil {
			return err
		}
	}
	return fmt.Errorf("%w %s", ErrNotChained, c.path)
}

// chain adds the entry to the effective configuration, and removes the generated lists of others.
func (i *Installer) chain(now time.Time) (changes []string, err error) {
	c, err := i.effective(now)
	generated := ""
	switch {
	case errors.Is(err, ErrNoNetwork): // the files that lists were generated for are gone
	case err != nil:
		return nil, err
	default:
		if err := i.conflict.waits(now, c); err != nil {
			return nil, err
		}
		path := c.path
		if c.isSingle() {
			path = generatedPath(c.path, i.Binary.Name)
			generated = path
		}
		removeStale(path, now)
		changed, err := i.addEntry(c, path)
		if err != nil {
			return nil, fmt.Errorf("network configuration %s: %w", c.path, err)
		}
		i.network.Store(&c.list.Name)
		if changed {
			changes = append(changes, "entry in "+path)
			if i.conflict.observe(now, c, i.Binary.Name) {
				return changes, i.conflict.err
			}
		}
	}
	removed, removeErr := removeGenerated(i.ConfDir, i.Binary.Name, generated)
	return append(changes, removed...), errors.Join(err, removeErr)
}

// addEntry writes a configuration with the entry to a path, and reports whether it was necessary.
func (i *Installer) addEntry(c *config, path string) (bool, error) {
	list, err := parseList(c.list.Bytes)
	if c.has(i.Binary.Name) && (err != nil || len(list.indexes(i.Binary.Name)) == 0) {
		return false, nil // an operator added it in a file of the network's directory
	}
	if err != nil {
		return false, err
	}
	text, err := list.insert(i.Binary.Name, i.Entry)
	if err != nil {
		return false, err
	}
	if path != c.path {
		return writeGenerated(path, c, text)
	}
	if bytes.Equal(text, c.list.Bytes) {
		return false, nil
	}
	return true, replace(c, text)
}
