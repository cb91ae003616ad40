// Package cnidirs finds the directories that a node's container runtime uses for CNI, in the
// runtime's own configuration.
package cnidirs

import (
	"cmp"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
)

// Dirs are the CNI directories of a container runtime.
type Dirs struct {
	Runtime string // its name; empty if no runtime was found
	ConfDir string // of the network configurations
	BinDir  string // of the plugins' binaries
}

// Default are the directories that runtimes use if their configuration names none.
var Default = Dirs{ConfDir: "/etc/cni/net.d", BinDir: "/opt/cni/bin"}

// ConfDirs are the directories of network configurations of all supported distributions.
var ConfDirs = []string{
	"/etc/cni/net.d", "/var/lib/rancher/k3s/agent/etc/cni/net.d", "/var/snap/microk8s/current/args/cni-network",
	"/etc/cni/multus/net.d", "/etc/kubernetes/cni/net.d",
}

// Find returns the directories of the runtime whose socket exists below root. It returns Default if
// there is no runtime, and Default with an error if a configuration cannot be read.
func Find(root string) (Dirs, error) {
	for _, r := range runtimes {
		if !slices.ContainsFunc(r.sockets, func(path string) bool { return isSocket(filepath.Join(root, path)) }) {
			continue
		}
		var c config
		if err := c.load(root, r, root, r.files); err != nil {
			return Default, fmt.Errorf("%s: %w", r.name, err)
		}
		if len(c.files) == 0 && r.name != "containerd" {
			continue // k3s and RKE2 have the same socket; other runtimes can be configured by flags alone
		}
		dirs := Dirs{r.name, cmp.Or(c.confDir(), Default.ConfDir), firstExisting(root, append(c.binDirs(), Default.BinDir))}
		if !filepath.IsAbs(dirs.ConfDir) || !filepath.IsAbs(dirs.BinDir) {
			return Default, fmt.Errorf("%s: %q or %q is not an absolute path", r.name, dirs.ConfDir, dirs.BinDir)
		}
		return dirs, nil
	}
	return Default, nil
}

func isSocket(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().Type() == fs.ModeSocket
}

// firstExisting returns the first directory that exists, or else the first one.
func firstExisting(root string, dirs []string) string {
	for _, dir := range dirs {
		if info, err := os.Stat(filepath.Join(root, dir)); err == nil && info.IsDir() {
			return dir
		}
	}
	return dirs[0]
}
