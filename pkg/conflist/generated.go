package conflist

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// A configuration of a single plugin cannot have a second one. For such a file, the installer writes a
// generated list with that plugin and the entry, and leaves the file itself alone. The list is removed
// with the file.

// generatedPath returns the path of the list for a single plugin's configuration:
// "10-a-conf-kube2iam-cni.conflist" for "10-a.conf". Runtimes read it first, because "-" sorts before
// ".".
func generatedPath(config, plugin string) string {
	ext := filepath.Ext(config)
	return strings.TrimSuffix(config, ext) + "-" + ext[1:] + "-" + plugin + ".conflist"
}

// isGenerated reports whether a file name is one of generatedPath.
func isGenerated(name, plugin string) bool {
	base, ok := strings.CutSuffix(name, "-"+plugin+".conflist")
	return ok && (strings.HasSuffix(base, "-conf") || strings.HasSuffix(base, "-json"))
}

// writeGenerated writes the list for a single plugin's configuration.
func (i *Installer) writeGenerated(f *file, path string) ([]string, error) {
	text, err := generate(f.text, i.Entry)
	if err != nil {
		return nil, fmt.Errorf("network configuration %s: %w", f.path, err)
	}
	existing, err := readConfig(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		err = create(path, f.info, text)
	case existing == nil:
	case bytes.Equal(existing.text, text):
		return nil, nil
	default:
		err = replace(existing, text)
	}
	if err != nil {
		return nil, fmt.Errorf("chain the plugin: %w", err)
	}
	return []string{"entry in " + path + ", which stands before " + f.path}, nil
}

// generate returns a list of a plugin's configuration and the entry. libcni.ConfListFromConf would
// change large numbers.
func generate(config, entry []byte) ([]byte, error) {
	var head struct {
		Version json.RawMessage `json:"cniVersion"`
		Name    string          `json:"name"`
	}
	if err := json.Unmarshal(config, &head); err != nil {
		return nil, err
	}
	if head.Name == "" {
		return nil, errNoName
	}
	name, err := json.Marshal(head.Name)
	if err != nil {
		return nil, err
	}
	version := ""
	if head.Version != nil {
		version = fmt.Sprintf("  \"cniVersion\": %s,\n", head.Version)
	}
	return fmt.Appendf(nil, "{\n%s  \"name\": %s,\n  \"plugins\": [\n    %s,\n    %s\n  ]\n}\n",
		version, name, bytes.TrimSpace(config), entry), nil
}

var errNoName = errors.New("the network has no name")

// removeGenerated removes the generated lists except one.
func removeGenerated(dir, plugin, except string) (changes []string, err error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if !isGenerated(e.Name(), plugin) || path == except {
			continue
		}
		if removeErr := os.Remove(path); removeErr == nil {
			changes = append(changes, path+" removed")
		} else if !errors.Is(removeErr, fs.ErrNotExist) {
			err = errors.Join(err, removeErr)
		}
	}
	if len(changes) > 0 {
		err = errors.Join(err, syncDir(dir))
	}
	return changes, err
}
