// Package places finds where the container runtime of a node keeps what belongs to CNI, by the runtime's own configuration.
package places

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/conflist"
)

// Places are a runtime's directories.
type Places struct {
	// Runtime is the one whose these are; empty where none was found.
	Runtime string
	// Configurations is the directory of the network configurations, and Programs the one of the plugins' programs.
	Configurations, Programs string
}

// Default is what runtimes take that are told nothing else.
var Default = Places{Configurations: "/etc/cni/net.d", Programs: "/opt/cni/bin"}

// Known are the directories of network configurations that are known of any distribution.
var Known = []string{
	"/etc/cni/net.d", "/var/lib/rancher/k3s/agent/etc/cni/net.d", "/var/snap/microk8s/current/args/cni-network", "/etc/cni/multus/net.d", "/etc/kubernetes/cni/net.d",
}

// runtime is one that may run on a node: it does where its socket is.
type runtime struct {
	name    string
	sockets []string
	// config is its configuration, and more a directory of what is read after it, in the order of their names.
	config, more string
	read         func(text []byte) (settings, error)
	// vars are what stands for a directory in it.
	vars map[string]string
}

// runtimes are in the order in which they are believed: those that come with a distribution of Kubernetes run beside one that Docker uses.
var runtimes = []runtime{
	{name: "k3s", sockets: []string{"/run/k3s/containerd/containerd.sock"}, config: "/var/lib/rancher/k3s/agent/etc/containerd/config.toml", read: containerd},
	{name: "RKE2", sockets: []string{"/run/k3s/containerd/containerd.sock"}, config: "/var/lib/rancher/rke2/agent/etc/containerd/config.toml", read: containerd},
	{name: "microk8s", sockets: []string{"/var/snap/microk8s/common/run/containerd.sock"}, config: "/var/snap/microk8s/current/args/containerd.toml", read: containerd,
		vars: map[string]string{"${SNAP_DATA}": "/var/snap/microk8s/current", "${SNAP_COMMON}": "/var/snap/microk8s/common"}},
	{name: "CRI-O", sockets: []string{"/run/crio/crio.sock", "/var/run/crio/crio.sock"}, config: "/etc/crio/crio.conf", more: "/etc/crio/crio.conf.d", read: crio},
	{name: "containerd", sockets: []string{"/run/containerd/containerd.sock"}, config: "/etc/containerd/config.toml", read: containerd},
}

// settings are what a configuration says; what it does not say is empty.
type settings struct {
	configurations string
	programs       []string
	imports        []string // of other files, which may be patterns
}

// Find is the places of the runtime that runs on a node, below its root directory; Default where there is none, or says nothing. The error
// is that of a configuration that cannot be read, and comes with Default.
func Find(root string) (Places, error) {
	for _, r := range runtimes {
		if !slices.ContainsFunc(r.sockets, func(path string) bool { return isSocket(filepath.Join(root, path)) }) {
			continue
		}
		said, err := r.settings(root)
		if errors.Is(err, fs.ErrNotExist) && r.name != "containerd" {
			continue // another distribution's, which has the same socket, or one that is told by flags
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return Default, fmt.Errorf("%s: %w", r.name, err)
		}
		return Places{
			Runtime: r.name, Configurations: cmp.Or(said.configurations, Default.Configurations),
			Programs: cmp.Or(firstThere(root, said.programs), Default.Programs),
		}, nil
	}
	return Default, nil
}

func isSocket(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().Type() == fs.ModeSocket
}

// firstThere is the first of the directories that is there, or the first.
func firstThere(root string, dirs []string) string {
	for _, dir := range dirs {
		if info, err := os.Stat(filepath.Join(root, dir)); err == nil && info.IsDir() {
			return dir
		}
	}
	if len(dirs) == 0 {
		return ""
	}
	return dirs[0]
}

// settings are of all of the runtime's files: what a later one says counts.
func (r runtime) settings(root string) (all settings, err error) {
	files := []string{r.config}
	if r.more != "" {
		more, err := filepath.Glob(filepath.Join(root, r.more, "*"))
		if err != nil {
			return settings{}, err
		}
		for _, file := range more {
			files = append(files, strings.TrimPrefix(file, strings.TrimSuffix(root, "/")))
		}
	}
	found := false
	for at := 0; at < len(files) && at < maxFiles; at++ {
		text, err := conflist.Contents(filepath.Join(root, files[at]))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return settings{}, fmt.Errorf("%s: %w", files[at], err)
		}
		found = true
		said, err := r.read(text)
		if err != nil {
			return settings{}, fmt.Errorf("%s: %w", files[at], err)
		}
		all.configurations = cmp.Or(r.expand(said.configurations), all.configurations)
		if len(said.programs) > 0 {
			all.programs = nil
			for _, dir := range said.programs {
				all.programs = append(all.programs, r.expand(dir))
			}
		}
		for _, pattern := range said.imports {
			if !filepath.IsAbs(pattern) {
				pattern = filepath.Join(filepath.Dir(files[at]), pattern)
			}
			imported, err := filepath.Glob(filepath.Join(root, pattern))
			if err != nil {
				return settings{}, fmt.Errorf("%s: imports: %w", files[at], err)
			}
			for _, file := range imported {
				if file = strings.TrimPrefix(file, strings.TrimSuffix(root, "/")); !slices.Contains(files, file) {
					files = append(files, file)
				}
			}
		}
	}
	if !found {
		return settings{}, fmt.Errorf("%s: %w", r.config, fs.ErrNotExist)
	}
	for _, dir := range append([]string{all.configurations}, all.programs...) {
		if dir != "" && !filepath.IsAbs(dir) {
			return settings{}, fmt.Errorf("%s: %q is no absolute path", r.config, dir)
		}
	}
	return all, nil
}

// maxFiles bounds how many files one configuration is read from.
const maxFiles = 64

func (r runtime) expand(dir string) string {
	for name, value := range r.vars {
		dir = strings.ReplaceAll(dir, name, value)
	}
	return dir
}

// containerd reads the places of its CRI plugin, whose name went with the version of the file.
// https://github.com/containerd/containerd/blob/main/docs/cri/config.md
func containerd(text []byte) (settings, error) {
	type cni struct {
		BinDir  string   `toml:"bin_dir"`
		BinDirs []string `toml:"bin_dirs"`
		ConfDir string   `toml:"conf_dir"`
	}
	var config struct {
		Imports []string `toml:"imports"`
		Plugins map[string]struct {
			CNI cni `toml:"cni"`
		} `toml:"plugins"`
	}
	if err := toml.Unmarshal(text, &config); err != nil {
		return settings{}, err
	}
	said := settings{imports: config.Imports}
	for _, plugin := range []string{"cri", "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime"} {
		c := config.Plugins[plugin].CNI
		said.configurations = cmp.Or(c.ConfDir, said.configurations)
		switch {
		case len(c.BinDirs) > 0:
			said.programs = c.BinDirs
		case c.BinDir != "":
			said.programs = []string{c.BinDir}
		}
	}
	return said, nil
}

// crio reads CRI-O's (crio.conf(5), "CRIO.NETWORK TABLE").
func crio(text []byte) (settings, error) {
	var config struct {
		CRIO struct {
			Network struct {
				Dir        string   `toml:"network_dir"`
				PluginDir  string   `toml:"plugin_dir"`
				PluginDirs []string `toml:"plugin_dirs"`
			} `toml:"network"`
		} `toml:"crio"`
	}
	if err := toml.Unmarshal(text, &config); err != nil {
		return settings{}, err
	}
	n := config.CRIO.Network
	said := settings{configurations: n.Dir, programs: n.PluginDirs}
	if n.PluginDir != "" && len(said.programs) == 0 {
		said.programs = []string{n.PluginDir}
	}
	return said, nil
}
