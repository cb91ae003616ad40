package conflist

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
)

// parseLone reads one plugin's configuration, and refuses what libcni refuses (libcni/conf.go, NetworkPluginConfFromBytes).
func parseLone(text []byte) (network, error) {
	var c types.PluginConf
	if err := json.Unmarshal(text, &c); err != nil {
		return network{}, err
	}
	if c.Type == "" {
		return network{}, errors.New(`no "type"`)
	}
	return network{Name: c.Name, Type: c.Type}, nil
}

// parseNetwork reads a list, and refuses what libcni refuses (libcni/conf.go, NetworkConfFromBytes): a runtime passes over such a file, and
// takes the next one.
func parseNetwork(text []byte) (n network, err error) {
	var list map[string]json.RawMessage // the keys are as they are written, not in any case
	if err := json.Unmarshal(text, &list); err != nil {
		return n, err
	}
	name, ok := list["name"]
	if !ok {
		return n, errors.New(`no "name"`)
	}
	if err := words(name, &n.Name); err != nil {
		return n, fmt.Errorf(`"name": %w`, err)
	}
	if err := versions(list["cniVersion"], list["cniVersions"]); err != nil {
		return n, err
	}
	for _, key := range []string{"disableCheck", "disableGC", inlined} {
		value, err := truth(list[key])
		if err != nil {
			return n, fmt.Errorf("%q: %w", key, err)
		}
		if key == inlined {
			n.Inlined = jsonBool(value)
		}
	}
	plugins, ok := list["plugins"]
	if !ok {
		if n.Inlined {
			return n, errNoPlugins
		}
		return n, nil // they may stand beside it
	}
	var configs []json.RawMessage
	if err := json.Unmarshal(plugins, &configs); err != nil {
		return n, fmt.Errorf(`"plugins": %w`, err)
	}
	if len(configs) == 0 {
		return n, errNoPlugins
	}
	for i, text := range configs {
		plugin, err := parseLone(text)
		if err != nil {
			return n, fmt.Errorf("plugin %d: %w", i, err)
		}
		n.Plugins = append(n.Plugins, entry{plugin.Type})
	}
	return n, nil
}

// inlined is the key that keeps plugins beside a list out of it.
const inlined = "loadOnlyInlinedPlugins"

// words reads a string, and refuses null.
func words(text json.RawMessage, into *string) error {
	if string(text) == "null" {
		return errors.New("it is no string")
	}
	return json.Unmarshal(text, into)
}

// versions checks the two keys of the CNI version, either of which may be missing.
func versions(one, many json.RawMessage) error {
	var v string
	if one != nil {
		if err := words(one, &v); err != nil {
			return fmt.Errorf(`"cniVersion": %w`, err)
		}
	}
	if many == nil {
		return nil
	}
	var all []json.RawMessage
	if string(many) == "null" {
		return errors.New(`"cniVersions": it is no list`)
	}
	if err := json.Unmarshal(many, &all); err != nil {
		return fmt.Errorf(`"cniVersions": %w`, err)
	}
	listed := []string{}
	for _, text := range all {
		var each string
		if err := words(text, &each); err != nil {
			return fmt.Errorf(`"cniVersions": %w`, err)
		}
		listed = append(listed, each)
	}
	if v != "" {
		listed = append(listed, v)
	}
	for _, v := range listed {
		if _, _, _, err := version.ParseVersion(v); err != nil {
			return err
		}
	}
	return nil
}

// truth reads a boolean that may be a string.
func truth(text json.RawMessage) (bool, error) {
	var b bool
	if text == nil {
		return false, nil
	}
	if string(text) != "null" && json.Unmarshal(text, &b) == nil {
		return b, nil
	}
	var s string
	if err := words(text, &s); err != nil {
		return false, err
	}
	switch strings.ToLower(s) {
	case "true":
		return true, nil
	case "false":
		return false, nil
	}
	return false, fmt.Errorf("%q is neither true nor false", s)
}
