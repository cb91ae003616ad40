package cnidirs

import (
	"net"
	"os"
	"path/filepath"
	"testing"
)

// newRoot returns a root directory with these sockets and files. A file "/" is a directory.
func newRoot(t *testing.T, sockets []string, files map[string]string) string {
	t.Helper()
	root, err := os.MkdirTemp("", "n") // the path of a socket is limited to 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(root) })
	for _, path := range sockets {
		path = filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
	}
	for path, text := range files {
		path = filepath.Join(root, path)
		if text == "/" {
			if err := os.MkdirAll(path, 0o755); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

const (
	containerdSocket = "/run/containerd/containerd.sock"
	k3sSocket        = "/run/k3s/containerd/containerd.sock"
	crioSocket       = "/run/crio/crio.sock"
	configFile       = "/etc/containerd/config.toml"
)

func TestFind(t *testing.T) {
	for name, tt := range map[string]struct {
		sockets []string
		files   map[string]string
		want    Dirs
	}{
		"no runtime":                 {nil, map[string]string{configFile: "[plugins.cri.cni]\nconf_dir = \"/x\""}, Default},
		"containerd without a file":  {[]string{containerdSocket}, nil, Dirs{"containerd", "/etc/cni/net.d", "/opt/cni/bin"}},
		"a file without directories": {[]string{containerdSocket}, map[string]string{configFile: "version = 2\n"}, Dirs{"containerd", "/etc/cni/net.d", "/opt/cni/bin"}},
		"version 1":                  {[]string{containerdSocket}, map[string]string{configFile: "[plugins.cri.cni]\nbin_dir = \"/b\"\nconf_dir = \"/c\""}, Dirs{"containerd", "/c", "/b"}},
		"version 2, as in Debian":    {[]string{containerdSocket}, map[string]string{configFile: "version = 2\n[plugins]\n  [plugins.\"io.containerd.grpc.v1.cri\"]\n    [plugins.\"io.containerd.grpc.v1.cri\".cni]\n      bin_dir = \"/usr/lib/cni\"\n      conf_dir = \"/etc/cni/net.d\"\n"}, Dirs{"containerd", "/etc/cni/net.d", "/usr/lib/cni"}},
		"version 3":                  {[]string{containerdSocket}, map[string]string{configFile: "version = 3\n[plugins.'io.containerd.cri.v1.runtime'.cni]\nbin_dirs = ['/none', '/there']\nconf_dir = '/c'\n", "/there": "/"}, Dirs{"containerd", "/c", "/there"}},
		"bin_dirs that do not exist": {[]string{containerdSocket}, map[string]string{configFile: "version = 3\n[plugins.'io.containerd.cri.v1.runtime'.cni]\nbin_dirs = ['/one', '/two']\n"}, Dirs{"containerd", "/etc/cni/net.d", "/one"}},
		"imports": {[]string{containerdSocket}, map[string]string{
			configFile:                      "version = 2\nimports = ['conf.d/*.toml', '/other/y.toml']\n[plugins.'io.containerd.grpc.v1.cri'.cni]\nbin_dir = '/b'\nconf_dir = '/c'\n",
			"/etc/containerd/conf.d/a.toml": "version = 2\nimports = ['a.toml']\n[plugins.'io.containerd.grpc.v1.cri'.cni]\nconf_dir = '/a'\n",
			"/other/y.toml":                 "version = 2\n[plugins.'io.containerd.grpc.v1.cri'.cni]\nbin_dir = '/y'\n",
		}, Dirs{"containerd", "/a", "/y"}},
		"k3s and Docker's containerd": {[]string{containerdSocket, k3sSocket}, map[string]string{configFile: "version = 2\n",
			"/var/lib/rancher/k3s/agent/etc/containerd/config.toml": "version = 3\n[plugins.'io.containerd.cri.v1.runtime'.cni]\nbin_dirs = [\"/var/lib/rancher/k3s/data/cni\"]\nconf_dir = \"/var/lib/rancher/k3s/agent/etc/cni/net.d\"\n",
		}, Dirs{"k3s", "/var/lib/rancher/k3s/agent/etc/cni/net.d", "/var/lib/rancher/k3s/data/cni"}},
		"RKE2": {[]string{k3sSocket}, map[string]string{"/var/lib/rancher/rke2/agent/etc/containerd/config.toml": "version = 2\n"}, Dirs{"RKE2", "/etc/cni/net.d", "/opt/cni/bin"}},
		"microk8s": {[]string{"/var/snap/microk8s/common/run/containerd.sock"}, map[string]string{
			"/var/snap/microk8s/current/args/containerd.toml": "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".cni]\nbin_dir = \"${SNAP_DATA}/opt/cni/bin\"\nconf_dir = \"${SNAP_DATA}/args/cni-network\"\n",
		}, Dirs{"microk8s", "/var/snap/microk8s/current/args/cni-network", "/var/snap/microk8s/current/opt/cni/bin"}},
		"CRI-O": {[]string{crioSocket}, map[string]string{
			"/etc/crio/crio.conf":           "[crio.network]\nplugin_dir = \"/old\"\n",
			"/etc/crio/crio.conf.d/10.conf": "[crio.network]\nnetwork_dir = \"/etc/cni/multus/net.d\"\nplugin_dirs = [\"/var/lib/cni/bin\", \"/usr/libexec/cni\"]\n",
		}, Dirs{"CRI-O", "/etc/cni/multus/net.d", "/var/lib/cni/bin"}},
		"CRI-O without its main file": {[]string{crioSocket}, map[string]string{"/etc/crio/crio.conf.d/10.conf": "[crio.network]\nnetwork_dir = \"/n\"\n"}, Dirs{"CRI-O", "/n", "/opt/cni/bin"}},
	} {
		t.Run(name, func(t *testing.T) {
			if got, err := Find(newRoot(t, tt.sockets, tt.files)); err != nil || got != tt.want {
				t.Errorf("%+v, %v; want %+v", got, err, tt.want)
			}
		})
	}
}

func TestFindReportsInvalidConfigurations(t *testing.T) {
	for name, text := range map[string]string{
		"not TOML":        "plugins = [",
		"another type":    "[plugins.cri.cni]\nconf_dir = 1",
		"a relative path": "[plugins.cri.cni]\nconf_dir = \"net.d\"",
		"a variable":      "[plugins.cri.cni]\nbin_dir = \"${SNAP_DATA}/bin\"",
		"a bad pattern":   "imports = ['[']",
	} {
		t.Run(name, func(t *testing.T) {
			if got, err := Find(newRoot(t, []string{containerdSocket}, map[string]string{configFile: text})); err == nil || got != Default {
				t.Errorf("%+v, %v", got, err)
			}
		})
	}
}
