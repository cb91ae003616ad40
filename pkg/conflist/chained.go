// Package conflist finds the network configurations of a node that a plugin is chained in.
package conflist

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"

	"github.com/containernetworking/cni/libcni"
)

// Chained are the names of the networks in a directory that have a plugin of the type in their chain, in whichever file: a
// runtime takes the first of them, and others (Multus) take any. A file that cannot be read is in the error; the others come
// with it all the same. A directory that is not there has none.
func Chained(dir, plugin string) (networks []string, err error) {
	files, err := libcni.ConfFiles(dir, []string{".conflist", ".conf", ".json"})
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("network configurations: %w", err)
	}
	var errs []error
	for _, file := range files {
		network, err := load(file)
		if err != nil {
			errs = append(errs, fmt.Errorf("network configuration %s: %w", filepath.Base(file), err))
			continue
		}
		if Has(network, plugin) && !slices.Contains(networks, network.Name) {
			networks = append(networks, network.Name)
		}
	}
	return networks, errors.Join(errs...)
}

// load reads a file as runtimes do: by its name it is a chain, or the configuration of a single plugin.
func load(file string) (*libcni.NetworkConfigList, error) {
	if filepath.Ext(file) == ".conflist" {
		return libcni.NetworkConfFromFile(file)
	}
	single, err := libcni.ConfFromFile(file)
	if err != nil {
		return nil, err
	}
	return libcni.ConfListFromConf(single)
}

// Has tells whether a network has a plugin of the type in its chain.
func Has(network *libcni.NetworkConfigList, plugin string) bool {
	return slices.ContainsFunc(network.Plugins, func(p *libcni.PluginConfig) bool { return p.Network.Type == plugin })
}
