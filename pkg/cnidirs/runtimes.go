package cnidirs

import (
	"cmp"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// runtime is a container runtime. It runs on a node if one of its sockets exists.
type runtime struct {
	name      string
	sockets   []string
	config    string // file
	configDir string // of files that override config, in the order of their names
	parse     func(text []byte) (settings, error)
	vars      map[string]string // that the configuration uses for directories
}

// runtimes are in order of precedence: a distribution's own containerd can run next to the containerd
// that Docker uses.
var runtimes = []runtime{
	{
		name: "k3s", sockets: []string{"/run/k3s/containerd/containerd.sock"},
		config: "/var/lib/rancher/k3s/agent/etc/containerd/config.toml", parse: parseContainerd,
	},
	{
		name: "RKE2", sockets: []string{"/run/k3s/containerd/containerd.sock"},
		config: "/var/lib/rancher/rke2/agent/etc/containerd/config.toml", parse: parseContainerd,
	},
	{
		name: "microk8s", sockets: []string{"/var/snap/microk8s/common/run/containerd.sock"},
		config: "/var/snap/microk8s/current/args/containerd.toml", parse: parseContainerd,
		vars: map[string]string{"${SNAP_DATA}": "/var/snap/microk8s/current", "${SNAP_COMMON}": "/var/snap/microk8s/common"},
	},
	{
		name: "CRI-O", sockets: []string{"/run/crio/crio.sock", "/var/run/crio/crio.sock"},
		config: "/etc/crio/crio.conf", configDir: "/etc/crio/crio.conf.d", parse: parseCRIO,
	},
	{
		name: "containerd", sockets: []string{"/run/containerd/containerd.sock"},
		config: "/etc/containerd/config.toml", parse: parseContainerd,
	},
}

func (r runtime) expand(dir string) string {
	for name, value := range r.vars {
		dir = strings.ReplaceAll(dir, name, value)
	}
	return dir
}

// settings are what one configuration file sets.
type settings struct {
	confDir string
	binDirs []string
	imports []string // patterns of other files
}

// parseContainerd reads the settings of containerd's CRI plugin, whose name depends on the version of
// the file (https://github.com/containerd/containerd/blob/main/docs/cri/config.md).
func parseContainerd(text []byte) (settings, error) {
	var config struct {
		Imports []string `toml:"imports"`
		Plugins map[string]struct {
			CNI struct {
				BinDir  string   `toml:"bin_dir"`
				BinDirs []string `toml:"bin_dirs"`
				ConfDir string   `toml:"conf_dir"`
			} `toml:"cni"`
		} `toml:"plugins"`
	}
	if err := toml.Unmarshal(text, &config); err != nil {
		return settings{}, err
	}
	s := settings{imports: config.Imports}
	for _, plugin := range []string{"cri", "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime"} {
		cni := config.Plugins[plugin].CNI
		s.confDir = cmp.Or(cni.ConfDir, s.confDir)
		if len(cni.BinDirs) > 0 {
			s.binDirs = cni.BinDirs
		} else if cni.BinDir != "" {
			s.binDirs = []string{cni.BinDir}
		}
	}
	return s, nil
}

// parseCRIO reads CRI-O's settings (crio.conf(5), "CRIO.NETWORK TABLE").
func parseCRIO(text []byte) (settings, error) {
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
	network := config.CRIO.Network
	s := settings{confDir: network.Dir, binDirs: network.PluginDirs}
	if network.PluginDir != "" && len(s.binDirs) == 0 {
		s.binDirs = []string{network.PluginDir}
	}
	return s, nil
}
