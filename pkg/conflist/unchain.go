package conflist

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// Unchain removes the plugin's entries from all network configurations of a directory, and the
// generated lists. It returns a line for each change. It continues after an error, and returns all
// errors. A directory that does not exist is an error: the runtime reads another one.
func Unchain(dir, plugin string) (changes []string, err error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("network configurations: %w", err)
	}
	var errs []error
	for _, e := range entries {
		if e.IsDir() || filepath.Ext(e.Name()) != ".conflist" || isGenerated(e.Name(), plugin) {
			continue
		}
		path := filepath.Join(dir, e.Name())
		err := retryChanged(func() error {
			removed, err := removeEntry(path, plugin)
			if removed {
				changes = append(changes, "entry out of "+path)
			}
			return err
		})
		if err != nil {
			errs = append(errs, fmt.Errorf("network configuration %s: %w", e.Name(), err))
		}
	}
	removed, err := removeGenerated(dir, plugin, "")
	changes, err = append(changes, removed...), errors.Join(append(errs, err)...)
	// An operator can have added the plugin in a file of a network's directory, and a primary CNI can
	// have written a configuration with it since ReadDir. Runtimes do not use invalid files.
	if networks, _ := Chained(dir, plugin); len(networks) > 0 && err == nil {
		err = fmt.Errorf("the plugin is still in the chain of %q: take it out of the files of their directories below %s", networks, dir)
	}
	return changes, err
}

func removeEntry(path, plugin string) (removed bool, err error) {
	f, err := readConfig(path)
	if f == nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
		return false, err
	}
	list, err := parseList(f.text)
	if err != nil || len(list.indexes(plugin)) == 0 {
		return false, nil // runtimes do not use it, or it has no entry
	}
	text, err := list.remove(plugin)
	if err != nil {
		return false, err
	}
	err = replace(f, text)
	return err == nil, err
}
