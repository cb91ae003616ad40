package cnidirs

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// config is what a runtime's configuration says of CNI.
type config struct {
	// Of containerd: https://github.com/containerd/containerd/blob/main/docs/cri/config.md
	Imports []string
	Plugins map[string]struct {
		CNI struct {
			ConfDir string   `toml:"conf_dir"`
			BinDir  string   `toml:"bin_dir"`
			BinDirs []string `toml:"bin_dirs"`
		}
	}
	// Of CRI-O: crio.conf(5), "CRIO.NETWORK TABLE"
	CRIO struct {
		Network struct {
			NetworkDir string   `toml:"network_dir"`
			PluginDir  string   `toml:"plugin_dir"`
			PluginDirs []string `toml:"plugin_dirs"`
		}
	}

	files []string // that were decoded
}

// load decodes the files that match patterns, and then those that they import, over the
// configuration of earlier files. Absolute patterns are below root, and relative ones below dir.
func (c *config) load(root string, r runtime, dir string, patterns []string) error {
	for _, pattern := range patterns {
		path := filepath.Join(dir, pattern)
		if filepath.IsAbs(pattern) {
			path = filepath.Join(root, pattern)
		}
		files, err := filepath.Glob(path)
		if err != nil {
			return fmt.Errorf("%q: %w", pattern, err)
		}
		for _, file := range files {
			if slices.Contains(c.files, file) {
				continue
			}
			c.files, c.Imports = append(c.files, file), nil
			text, err := os.ReadFile(file)
			if err != nil {
				return err
			}
			if err := toml.Unmarshal([]byte(strings.NewReplacer(r.vars...).Replace(string(text))), c); err != nil {
				return fmt.Errorf("%s: %w", file, err)
			}
			if err := c.load(root, r, filepath.Dir(file), c.Imports); err != nil {
				return err
			}
		}
	}
	return nil
}

// criPlugins are the names of containerd's CRI plugin in the versions of its configuration.
var criPlugins = []string{"io.containerd.cri.v1.runtime", "io.containerd.grpc.v1.cri", "cri"}

func (c *config) confDir() string {
	dir := c.CRIO.Network.NetworkDir
	for _, name := range criPlugins {
		dir = cmp.Or(dir, c.Plugins[name].CNI.ConfDir)
	}
	return dir
}

// binDirs returns the directories of plugins in order of preference.
func (c *config) binDirs() []string {
	dirs := append(slices.Clone(c.CRIO.Network.PluginDirs), c.CRIO.Network.PluginDir)
	for _, name := range criPlugins {
		cni := c.Plugins[name].CNI
		dirs = append(append(dirs, cni.BinDirs...), cni.BinDir)
	}
	return slices.DeleteFunc(dirs, func(dir string) bool { return dir == "" })
}
