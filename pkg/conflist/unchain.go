package conflist

import (
	"errors"
	"fmt"
)

// Unchain removes the plugin's entries from all network configurations of a directory, and the
// generated lists. It returns a line for each change. It continues after an error, and returns all
// errors.
func Unchain(dir, plugin string) (changes []string, err error) {
	configs, err := readConfigs(dir)
	errs := []error{err}
	for _, c := range configs {
		if c.err != nil || c.isSingle() || isGenerated(c.path, plugin) {
			continue // runtimes do not use invalid files
		}
		removed, err := c.removeEntry(plugin)
		if err != nil {
			errs = append(errs, fmt.Errorf("network configuration %s: %w", c.path, err))
		} else if removed {
			changes = append(changes, "entry out of "+c.path)
		}
	}
	removed, err := removeGenerated(dir, plugin, "")
	changes, err = append(changes, removed...), errors.Join(append(errs, err)...)
	// An operator can have added the plugin in a file of a network's directory, and a primary CNI
	// can have written a configuration with it since readConfigs.
	if networks, _ := Chained(dir, plugin); len(networks) > 0 && err == nil {
		err = fmt.Errorf("the plugin is still in the chain of %q: take it out of the files of their directories below %s", networks, dir)
	}
	return changes, err
}

// removeEntry removes the plugin's entries from a list, and reports whether it had any.
func (c *config) removeEntry(plugin string) (bool, error) {
	list, err := parseList(c.list.Bytes)
	if err != nil || len(list.indexes(plugin)) == 0 {
		return false, nil // the plugins are in files of the network's directory
	}
	if list, err = list.remove(plugin); err != nil {
		return false, err
	}
	return true, replace(c, list.text)
}
