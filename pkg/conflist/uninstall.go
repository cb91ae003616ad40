package conflist

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// Unchain takes the plugin's entries out of all network configurations of a directory, and removes the lists that Install made. What it
// did is in the list, a line each. It goes on after an error, and returns all of them. A directory that is not there is one: a runtime
// reads another, then.
func Unchain(dir, plugin string) (did []string, err error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("network configurations: %w", err)
	}
	var errs []error
	for _, e := range entries {
		if e.IsDir() || filepath.Ext(e.Name()) != ".conflist" || isMade(e.Name(), plugin) {
			continue
		}
		for range 5 {
			var line string
			if line, err = unchain(filepath.Join(dir, e.Name()), plugin); line != "" {
				did = append(did, line)
			}
			if !errors.Is(err, errChanged) {
				break
			}
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("network configuration %s: %w", e.Name(), err))
		}
	}
	removed, err := removeMade(dir, plugin, "")
	did, errs = append(did, removed...), append(errs, err)
	// By hand, in a file of its own beside a list, or in one that came this moment. Files that make no sense call nothing.
	if networks, _ := Chained(dir, plugin); len(networks) > 0 && errors.Join(errs...) == nil {
		errs = append(errs, fmt.Errorf("the plugin is still in the chain of %q: take it out of the files of their directories below %s", networks, dir))
	}
	return did, errors.Join(errs...)
}

func unchain(path, plugin string) (string, error) {
	f, err := read(path)
	if f == nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
		return "", err
	}
	list, err := parseList(f.text)
	if err != nil || len(list.of(plugin)) == 0 {
		return "", nil // no runtime takes it, or it is not chained in it
	}
	text, err := list.without(plugin)
	if err != nil {
		return "", err
	}
	if err := replace(f, text); err != nil {
		return "", err
	}
	return "entry out of " + path, nil
}
