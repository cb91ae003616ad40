// Package conflist finds the network configurations of a node that a plugin is chained in, chains it in the effective one, and puts
// the plugin's binary in place.
//
// It reads them itself: libcni, which runtimes read them by, brings HTTP, TLS and OpenTelemetry into a program that is started
// for each pod.
package conflist

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// maxConfig bounds a file.
const maxConfig = 1 << 20

// network is what is read of a configuration: a list of plugins, or that of a single one (CNI specification, section 1).
type network struct {
	Name    string   `json:"name"`
	Type    string   `json:"type"`
	Plugins []entry  `json:"plugins"`
	Inlined jsonBool `json:"loadOnlyInlinedPlugins"`
}

type entry struct {
	Type string `json:"type"`
}

// jsonBool is a boolean, or one as a string, as libcni takes it.
type jsonBool bool

func (b *jsonBool) UnmarshalJSON(data []byte) error {
	switch strings.ToLower(strings.Trim(string(data), `"`)) {
	case "true", "t", "1":
		*b = true
	}
	return nil
}

// Chained are the names of the networks in a directory that have a plugin of the type in their chain, in whichever file: a
// runtime takes the first of them, and others (Multus) take any. A file that cannot be read is in the error; the others come
// with it all the same. A directory that is not there has none.
func Chained(dir, plugin string) (networks []string, err error) {
	files, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("network configurations: %w", err)
	}
	var errs []error
	for _, f := range files {
		if f.IsDir() || !isConfig(f.Name()) {
			continue
		}
		var n network
		if err := load(filepath.Join(dir, f.Name()), &n); err != nil {
			errs = append(errs, fmt.Errorf("network configuration %s: %w", f.Name(), err))
			continue
		}
		more, err := n.folder(dir)
		if err != nil {
			errs = append(errs, fmt.Errorf("network configuration %s: %w", f.Name(), err))
		}
		n.Plugins = append(n.Plugins, more...)
		if n.has(plugin) && !slices.Contains(networks, n.Name) {
			networks = append(networks, n.Name)
		}
	}
	return networks, errors.Join(errs...)
}

// folder are the plugins that stand in a directory of the network's name next to its configuration (libcni/conf.go,
// NetworkConfFromFile).
func (n network) folder(dir string) ([]entry, error) {
	if n.Inlined || n.Type != "" || n.Name == "" || n.Name != filepath.Base(n.Name) || n.Name == ".." || n.Name == "." {
		return nil, nil
	}
	files, err := filepath.Glob(filepath.Join(escaped(dir), escaped(n.Name), "*.conf"))
	var entries []entry
	errs := []error{err}
	for _, file := range files {
		text, err := Contents(file)
		if err == nil {
			var plugin network
			plugin, err = parseLone(text)
			entries = append(entries, entry{plugin.Type})
		}
		errs = append(errs, err)
	}
	return entries, errors.Join(errs...)
}

// escaped is a path as a pattern that matches nothing else.
func escaped(path string) string {
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`).Replace(path)
}

func load(file string, into any) error {
	data, err := Contents(file)
	if err != nil {
		return err
	}
	return json.Unmarshal(data, into)
}

// Contents is a file's text, of a configuration of CNI's or of a runtime's; one of more than a mebibyte is none.
func Contents(file string) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxConfig+1))
	if err == nil && len(data) > maxConfig {
		err = fmt.Errorf("more than %d bytes", maxConfig)
	}
	return data, err
}

// Has tells whether a configuration has a plugin of the type in its chain.
func Has(config []byte, plugin string) bool {
	var n network
	return json.Unmarshal(config, &n) == nil && n.has(plugin)
}

func (n network) has(plugin string) bool {
	return n.Type == plugin || slices.Contains(n.Plugins, entry{plugin})
}

// Entries are the plugin's entries in all lists of a directory, as they stand there. What cannot be read has none.
func Entries(dir, plugin string) (entries [][]byte, err error) {
	files, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("network configurations: %w", err)
	}
	for _, f := range files {
		if f.IsDir() || filepath.Ext(f.Name()) != ".conflist" {
			continue
		}
		text, err := Contents(filepath.Join(dir, f.Name()))
		if err != nil {
			continue
		}
		if list, err := parseList(text); err == nil {
			for _, at := range list.of(plugin) {
				entries = append(entries, list.plugin(at))
			}
		}
	}
	return entries, nil
}
