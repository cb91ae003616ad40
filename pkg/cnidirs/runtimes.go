package cnidirs

// runtime is a container runtime. It runs on a node if one of its sockets exists.
type runtime struct {
	name    string
	sockets []string
	files   []string // patterns of the configuration's files; later ones override earlier ones
	vars    []string // names and values of variables in the configuration
}

// runtimes are in order of precedence: a distribution's own containerd can run next to the
// containerd that Docker uses.
var runtimes = []runtime{
	{
		name: "k3s", sockets: []string{"/run/k3s/containerd/containerd.sock"},
		files: []string{"/var/lib/rancher/k3s/agent/etc/containerd/config.toml"},
	},
	{
		name: "RKE2", sockets: []string{"/run/k3s/containerd/containerd.sock"},
		files: []string{"/var/lib/rancher/rke2/agent/etc/containerd/config.toml"},
	},
	{
		name: "microk8s", sockets: []string{"/var/snap/microk8s/common/run/containerd.sock"},
		files: []string{"/var/snap/microk8s/current/args/containerd.toml"},
		vars:  []string{"${SNAP_DATA}", "/var/snap/microk8s/current", "${SNAP_COMMON}", "/var/snap/microk8s/common"},
	},
	{
		name: "CRI-O", sockets: []string{"/run/crio/crio.sock", "/var/run/crio/crio.sock"},
		files: []string{"/etc/crio/crio.conf", "/etc/crio/crio.conf.d/*"},
	},
	{
		name: "containerd", sockets: []string{"/run/containerd/containerd.sock"},
		files: []string{"/etc/containerd/config.toml"},
	},
}
