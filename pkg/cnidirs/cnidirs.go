// Package cnidirs finds the directories that a node's container runtime uses for CNI, in the
// runtime's own configuration.
package cnidirs

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/conflist"
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
		s, err := r.readSettings(root)
		if errors.Is(err, fs.ErrNotExist) && r.name != "containerd" {
			continue // k3s and RKE2 have the same socket; other runtimes can be configured by flags alone
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return Default, fmt.Errorf("%s: %w", r.name, err)
		}
		return Dirs{
			Runtime: r.name, ConfDir: cmp.Or(s.confDir, Default.ConfDir), BinDir: cmp.Or(firstExisting(root, s.binDirs), Default.BinDir),
		}, nil
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
	if len(dirs) == 0 {
		return ""
	}
	return dirs[0]
}

// maxFiles bounds the files of one runtime's configuration.
const maxFiles = 64

// readSettings reads all files of the runtime's configuration. Later files override earlier ones.
func (r runtime) readSettings(root string) (settings, error) {
	var all settings
	glob := func(pattern string) ([]string, error) { return glob(root, pattern) }
	files := []string{r.config}
	if r.configDir != "" {
		more, err := glob(filepath.Join(r.configDir, "*"))
		if err != nil {
			return settings{}, err
		}
		files = append(files, more...)
	}
	found := false
	for i := 0; i < len(files) && i < maxFiles; i++ {
		text, err := conflist.ReadFile(filepath.Join(root, files[i]))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return settings{}, fmt.Errorf("%s: %w", files[i], err)
		}
		found = true
		s, err := r.parse(text)
		if err != nil {
			return settings{}, fmt.Errorf("%s: %w", files[i], err)
		}
		all.confDir = cmp.Or(r.expand(s.confDir), all.confDir)
		if len(s.binDirs) > 0 {
			all.binDirs = nil
			for _, dir := range s.binDirs {
				all.binDirs = append(all.binDirs, r.expand(dir))
			}
		}
		for _, pattern := range s.imports {
			if !filepath.IsAbs(pattern) {
				pattern = filepath.Join(filepath.Dir(files[i]), pattern)
			}
			imported, err := glob(pattern)
			if err != nil {
				return settings{}, fmt.Errorf("%s: imports: %w", files[i], err)
			}
			for _, file := range imported {
				if !slices.Contains(files, file) {
					files = append(files, file)
				}
			}
		}
	}
	if !found {
		return settings{}, fmt.Errorf("%s: %w", r.config, fs.ErrNotExist)
	}
	for _, dir := range append([]string{all.confDir}, all.binDirs...) {
		if dir != "" && !filepath.IsAbs(dir) {
			return settings{}, fmt.Errorf("%s: %q is not an absolute path", r.config, dir)
		}
	}
	return all, nil
}

// glob returns the files below root that match a pattern, without root.
func glob(root, pattern string) ([]string, error) {
	files, err := filepath.Glob(filepath.Join(root, pattern))
	for i := range files {
		files[i] = strings.TrimPrefix(files[i], strings.TrimSuffix(root, "/"))
	}
	return files, err
}
