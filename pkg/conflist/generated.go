package conflist

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// A configuration of a single plugin cannot have a second one. For such a file, the installer
// writes a generated list with that plugin and the entry, and leaves the file itself alone. The
// list is removed with the file.

// generatedPath returns the path of the list for a single plugin's configuration:
// "10-a-conf-kube2iam-cni.conflist" for "10-a.conf". Runtimes read it first, because "-" sorts
// before ".".
func generatedPath(config, plugin string) string {
	ext := filepath.Ext(config)
	return strings.TrimSuffix(config, ext) + "-" + ext[1:] + "-" + plugin + ".conflist"
}

// isGenerated reports whether a path is one of generatedPath.
func isGenerated(path, plugin string) bool {
	base, ok := strings.CutSuffix(path, "-"+plugin+".conflist")
	return ok && (strings.HasSuffix(base, "-conf") || strings.HasSuffix(base, "-json"))
}

// writeGenerated writes the list for a single plugin's configuration, unless it has the text, and
// reports whether it did.
func writeGenerated(path string, c *config, text []byte) (bool, error) {
	if existing, err := os.ReadFile(path); err == nil && bytes.Equal(existing, text) {
		return false, nil
	}
	pending, err := prepare(path, c.info, text)
	if err != nil {
		return false, err
	}
	defer pending.Cleanup()
	return true, pending.CloseAtomicallyReplace()
}

// removeGenerated removes the generated lists of a directory except one.
func removeGenerated(dir, plugin, except string) (changes []string, err error) {
	paths, err := filepath.Glob(filepath.Join(dir, "*-"+plugin+".conflist"))
	for _, path := range paths {
		if path == except || !isGenerated(path, plugin) {
			continue
		}
		if removeErr := os.Remove(path); removeErr == nil {
			changes = append(changes, path+" removed")
		} else if !errors.Is(removeErr, fs.ErrNotExist) {
			err = errors.Join(err, removeErr)
		}
	}
	return changes, err
}
