// Package conflist adds a plugin to the network configuration that container runtimes use on a
// node, and keeps it there.
package conflist

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containernetworking/cni/libcni"
)

// config is a network configuration as runtimes read it.
type config struct {
	path string
	info fs.FileInfo
	list *libcni.NetworkConfigList // for a file with a single plugin, the list that libcni makes of it
	err  error                     // why runtimes skip the file
}

// extensions are those of the files that runtimes read.
var extensions = []string{".conflist", ".conf", ".json"}

// readConfigs reads the configurations of a directory in the order of their names, which is that of
// runtimes. It returns none for a directory that does not exist.
func readConfigs(dir string) ([]*config, error) {
	paths, err := libcni.ConfFiles(dir, extensions)
	if err != nil {
		return nil, fmt.Errorf("network configurations: %w", err)
	}
	var configs []*config
	for _, path := range paths {
		c := &config{path: path}
		err := c.read()
		if errors.Is(err, fs.ErrNotExist) {
			continue // renamed since ConfFiles
		}
		if err != nil {
			c.err = fmt.Errorf("network configuration %s: %w", path, err)
		}
		configs = append(configs, c)
	}
	return configs, nil
}

// maxFile bounds a file.
const maxFile = 1 << 20

func (c *config) read() (err error) {
	if c.info, err = os.Stat(c.path); err != nil {
		return err
	}
	if c.info.Size() > maxFile {
		return fmt.Errorf("more than %d bytes", maxFile)
	}
	if !c.isSingle() {
		c.list, err = libcni.NetworkConfFromFile(c.path)
		return err
	}
	plugin, err := libcni.ConfFromFile(c.path)
	if err != nil {
		return err
	}
	// libcni.ConfListFromConf would round large numbers.
	list, err := json.Marshal(map[string]any{
		"cniVersion": plugin.Network.CNIVersion, "name": plugin.Network.Name, "plugins": []json.RawMessage{plugin.Bytes},
	})
	if err == nil {
		c.list, err = libcni.NetworkConfFromBytes(list)
	}
	return err
}

// isSingle reports whether the file is the configuration of one plugin (.conf, .json), not a list.
func (c *config) isSingle() bool { return filepath.Ext(c.path) != ".conflist" }

// settleTime is how long an invalid file counts as being written.
const settleTime = 2 * time.Second

// isUnsettled reports whether the file was written a moment ago: its writer may not be done. A time
// in the future is from before a change of the clock.
func (c *config) isUnsettled(now time.Time) bool {
	if c.info == nil {
		return false
	}
	age := now.Sub(c.info.ModTime())
	return age >= 0 && age < settleTime
}

// has reports whether one of the plugins is in the chain.
func (c *config) has(plugins ...string) bool {
	return slices.ContainsFunc(c.list.Plugins, func(p *libcni.PluginConfig) bool { return slices.Contains(plugins, p.Network.Type) })
}

// Chained returns the names of the networks in a directory whose chain has the plugin. It looks at
// all files: a runtime uses the first one, and Multus can use any. It returns an error for the
// files that it cannot read, together with the networks of the others.
func Chained(dir, plugin string) ([]string, error) {
	configs, err := readConfigs(dir)
	var networks []string
	errs := []error{err}
	for _, c := range configs {
		if c.err != nil {
			errs = append(errs, c.err)
		} else if c.has(plugin) && !slices.Contains(networks, c.list.Name) {
			networks = append(networks, c.list.Name)
		}
	}
	return networks, errors.Join(errs...)
}

// Has reports whether a configuration has the plugin in its chain.
func Has(config []byte, plugin string) bool {
	type entry struct{ Type string }
	var c struct {
		entry
		Plugins []entry
	}
	return json.Unmarshal(config, &c) == nil && (c.Type == plugin || slices.Contains(c.Plugins, entry{plugin}))
}

// Entries returns the plugin's entries in all configurations of a directory, as JSON. It ignores
// files that runtimes ignore.
func Entries(dir, plugin string) ([][]byte, error) {
	configs, err := readConfigs(dir)
	var entries [][]byte
	for _, c := range configs {
		if c.err != nil {
			continue
		}
		for _, p := range c.list.Plugins {
			if p.Network.Type == plugin {
				entries = append(entries, p.Bytes)
			}
		}
	}
	return entries, err
}
