// Package conflist adds a plugin to the network configuration that container runtimes use on a node,
// and keeps it there.
package conflist

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/containernetworking/cni/libcni"
)

// file is a network configuration.
type file struct {
	path    string
	info    fs.FileInfo
	text    []byte
	name    string   // of the network
	plugins []string // the types of all plugins
	inlined []string // those that are in the file itself
	single  bool     // the configuration of one plugin (.conf, .json) instead of a list (.conflist)
}

// readConfig reads a configuration as runtimes do. If the file exists and libcni refuses it, readConfig
// returns both the file and an error.
func readConfig(path string) (*file, error) {
	f := &file{path: path, single: filepath.Ext(path) != ".conflist"}
	var err error
	if f.info, err = os.Stat(path); err != nil {
		return nil, err
	}
	if f.text, err = ReadFile(path); err != nil {
		return f, err
	}
	if f.single {
		config, err := libcni.ConfFromBytes(f.text)
		if err != nil {
			return f, err
		}
		f.name, f.inlined = config.Network.Name, []string{config.Network.Type}
		f.plugins = f.inlined
		return f, nil
	}
	list, err := libcni.NetworkConfFromBytes(f.text)
	if err != nil {
		return f, err
	}
	f.name, f.inlined = list.Name, pluginTypes(list.Plugins)
	f.plugins = f.inlined
	// libcni also loads plugins from a directory with the network's name (NetworkConfFromFile).
	if !list.LoadOnlyInlinedPlugins && list.Name == filepath.Base(list.Name) && list.Name != ".." {
		others, err := libcni.NetworkPluginConfsFromFiles(filepath.Dir(path), list.Name)
		if err != nil {
			return f, err
		}
		f.plugins = slices.Concat(f.inlined, pluginTypes(others))
	}
	if len(f.plugins) == 0 {
		return f, errNoPlugins
	}
	return f, nil
}

func pluginTypes(plugins []*libcni.PluginConfig) []string {
	var types []string
	for _, p := range plugins {
		types = append(types, p.Network.Type)
	}
	return types
}

// has reports whether the plugin is in the chain.
func (f *file) has(plugin string) bool { return slices.Contains(f.plugins, plugin) }

// isConfig reports whether runtimes read a file with this name.
func isConfig(name string) bool {
	return slices.Contains([]string{".conflist", ".conf", ".json"}, filepath.Ext(name))
}

// maxConfig bounds a file.
const maxConfig = 1 << 20

// ReadFile returns the content of a file, or an error if it has more than one MiB.
func ReadFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxConfig+1))
	if err == nil && len(text) > maxConfig {
		err = fmt.Errorf("more than %d bytes", maxConfig)
	}
	return text, err
}

// Chained returns the names of the networks in a directory whose chain has the plugin. It looks at all
// files: a runtime uses the first one, and Multus can use any. It returns an error for the files that
// it cannot read, together with the networks of the others, and none for a directory that does not
// exist.
func Chained(dir, plugin string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("network configurations: %w", err)
	}
	var networks []string
	var errs []error
	for _, e := range entries {
		if e.IsDir() || !isConfig(e.Name()) {
			continue
		}
		f, err := readConfig(filepath.Join(dir, e.Name()))
		if err != nil {
			errs = append(errs, fmt.Errorf("network configuration %s: %w", e.Name(), err))
		} else if f.has(plugin) && !slices.Contains(networks, f.name) {
			networks = append(networks, f.name)
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

// Entries returns the text of the plugin's entries in all lists of a directory. It ignores files that
// it cannot read.
func Entries(dir, plugin string) ([][]byte, error) {
	files, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("network configurations: %w", err)
	}
	var entries [][]byte
	for _, f := range files {
		if f.IsDir() || filepath.Ext(f.Name()) != ".conflist" {
			continue
		}
		text, err := ReadFile(filepath.Join(dir, f.Name()))
		if err != nil {
			continue
		}
		if list, err := parseList(text); err == nil {
			for _, i := range list.indexes(plugin) {
				entries = append(entries, list.plugin(i))
			}
		}
	}
	return entries, nil
}
