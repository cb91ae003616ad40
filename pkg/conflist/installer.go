package conflist

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"time"
)

// Installer installs a plugin's binary and adds its entry to the network configuration. It is not safe
// for concurrent use.
type Installer struct {
	ConfDir   string // of the network configurations
	BinDir    string // of the plugins' binaries
	Binary    Binary // its name is the plugin's type
	Entry     []byte // a JSON object with the plugin's "type"
	WatchOnly bool   // change nothing, and return ErrNotChained if the entry is missing
	// Interval is the time between two checks if the kernel reports no change.
	Interval time.Duration
	// Installed is called with the result of each check. It may be nil.
	Installed func(error)
	Log       *slog.Logger

	invalid       map[string]observation // by path
	loggedInvalid string
	loggedState   string
	unsettled     time.Time // since when a file is unsettled, or since the last warning; zero if none is
}

// ErrNotChained is the error of a network configuration without the plugin's entry.
var ErrNotChained = errors.New("the plugin is not in the chain of")

// Install installs the binary, and then adds the entry to the effective network configuration. It
// returns a line for each change. The error wraps ErrNoNetwork, ErrUnsettled, ErrNotChained, or an
// error of the file system.
func (i *Installer) Install() (changes []string, err error) {
	now := time.Now()
	if i.WatchOnly {
		return nil, i.check(now)
	}
	removeStale(i.BinDir, now, func(name string) bool { return name == i.Binary.Name })
	removeStale(i.ConfDir, now, isConfig)
	installed, err := i.Binary.install(i.BinDir)
	if err != nil {
		return nil, fmt.Errorf("the plugin's program: %w", err)
	}
	if installed {
		changes = append(changes, "program "+filepath.Join(i.BinDir, i.Binary.Name))
	}
	err = retryChanged(func() error {
		more, err := i.chain(now)
		changes = append(changes, more...)
		return err
	})
	return changes, err
}

// retryChanged calls f again while another program writes the file that f replaces.
func retryChanged(f func() error) (err error) {
	for range 5 {
		if err = f(); !errors.Is(err, errChanged) {
			break
		}
	}
	return err
}

// delegating are plugins that call the plugins of another configuration in the directory.
var delegating = []string{"multus", "multus-shim"}

// check returns ErrNotChained if the effective configuration does not have the plugin in its chain.
func (i *Installer) check(now time.Time) error {
	f, err := i.effective(now)
	if err != nil {
		return err
	}
	if f.has(i.Binary.Name) {
		return nil
	}
	if slices.ContainsFunc(delegating, f.has) {
		if networks, err := Chained(i.ConfDir, i.Binary.Name); len(networks) > 0 || err != nil {
			if len(networks) > 0 {
				return nil
			}
			return err
		}
	}
	return fmt.Errorf("%w %s", ErrNotChained, f.path)
}

// chain adds the entry to the effective configuration, or writes a generated list for it.
func (i *Installer) chain(now time.Time) ([]string, error) {
	f, err := i.effective(now)
	if errors.Is(err, ErrNoNetwork) {
		// The files that lists were generated for are gone, and with them the network.
		changes, removeErr := removeGenerated(i.ConfDir, i.Binary.Name, "")
		return changes, errors.Join(err, removeErr)
	}
	if err != nil {
		return nil, err
	}
	if f.name == "" {
		return nil, fmt.Errorf("network configuration %s: %w", f.path, errNoName)
	}
	var changes []string
	generated := ""
	if f.single {
		generated = generatedPath(f.path, i.Binary.Name)
		changes, err = i.writeGenerated(f, generated)
	} else {
		changes, err = i.addEntry(f)
	}
	if err != nil {
		return changes, err
	}
	removed, err := removeGenerated(i.ConfDir, i.Binary.Name, generated)
	return append(changes, removed...), err
}

// addEntry adds the entry to a list.
func (i *Installer) addEntry(f *file) ([]string, error) {
	if f.has(i.Binary.Name) && !slices.Contains(f.inlined, i.Binary.Name) {
		return nil, nil // an operator added it in a file of the network's directory
	}
	list, err := parseList(f.text)
	if err != nil {
		return nil, fmt.Errorf("network configuration %s: %w", f.path, err)
	}
	text, err := list.insert(i.Binary.Name, i.Entry)
	if err != nil {
		return nil, fmt.Errorf("network configuration %s: %w", f.path, err)
	}
	if bytes.Equal(text, f.text) {
		return nil, nil
	}
	if err := replace(f, text); err != nil {
		return nil, fmt.Errorf("chain the plugin: %w", err)
	}
	return []string{"entry in " + f.path}, nil
}
