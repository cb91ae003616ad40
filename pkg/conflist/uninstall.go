package conflist

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// Unchain takes the plugin's entries out of all network configurations of a directory, and puts back what Install put aside. What it did
// is in the list, a line each. It goes on after an error, and returns all of them.
func Unchain(dir, plugin string) (did []string, err error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("network configurations: %w", err)
	}
	var errs []error
	for _, e := range entries {
		if e.IsDir() || filepath.Ext(e.Name()) != ".conflist" {
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
	// Whatever else is aside, its list is not the one that was made of it: somebody has written another since.
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), aside) {
			if err := os.Remove(filepath.Join(dir, e.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, err)
			}
		}
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
	for _, ext := range []string{".conf", ".json"} {
		conf := strings.TrimSuffix(path, ".conflist") + ext
		if !standsFor(f.text, conf+aside, plugin) {
			continue
		}
		// The configuration first, which sorts before the list: there is one at any moment.
		if err := os.Rename(conf+aside, conf); err != nil {
			return "", err
		}
		return conf + " put back", errors.Join(os.Remove(path), syncDir(filepath.Dir(path)))
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
