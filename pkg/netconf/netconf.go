// Package netconf reads what a container runtime passes to the plugin: the network configuration on
// standard input, and CNI_ARGS. Its errors are of type *types.Error, have the code of the CNI
// specification ("Error"), and name key and value.
package netconf

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
)

// Config is a valid network configuration.
type Config struct {
	CNIVersion string // of the result; "0.1.0" if the configuration has none
	Name       string // of the network

	ProxyIP    netip.Addr // invalid for "auto"
	ProxyPort  uint16
	MetadataIP netip.Addr         // an IPv4 address
	StateDir   string             // absolute and clean
	Backend    attachment.Backend // empty for "auto"
	Guard      bool
	Mark       uint32              // never 0
	Datapath   attachment.Datapath // DatapathPod, or empty for "auto"

	PrevResult types.Result // nil if there is none
	// Valid are the attachments that GC keeps. It is nil if the runtime passed no list, and empty
	// if the runtime passed an empty list or null, which libcni writes for an empty list.
	Valid []types.GCAttachment
}

// cniKeys are keys of the CNI specification ("Plugin configuration objects", "Deriving execution
// configuration"), and "args", its convention for dynamic arguments.
var cniKeys = []string{
	"args", "capabilities", "cniVersion", "dns", "ipam", "name", "prevResult", "runtimeConfig", "type",
}

const (
	// reservedPrefix is that of keys which runtimes add, including those of later specifications.
	reservedPrefix = "cni.dev/"
	validKey       = reservedPrefix + "valid-attachments"
)

// Parse decodes a network configuration. An unknown key or an invalid value of the plugin's own
// keys is an error with code 7. Text that is not a JSON object, or an invalid value of another key,
// is one with code 6.
func Parse(stdin []byte) (*Config, error) {
	raw, err := decodeObject(stdin)
	if err != nil {
		return nil, err
	}
	if err := checkKeys(raw); err != nil {
		return nil, err
	}
	var conf types.PluginConf
	if err := json.Unmarshal(stdin, &conf); err != nil {
		return nil, undecodable("network configuration: %v", err)
	}
	if conf.CNIVersion == "" {
		conf.CNIVersion = "0.1.0"
	}
	if err := version.ParsePrevResult(&conf); err != nil {
		return nil, undecodable("prevResult: %v", err)
	}
	c := &Config{
		CNIVersion: conf.CNIVersion, Name: conf.Name, PrevResult: conf.PrevResult, Valid: conf.ValidAttachments,
		ProxyPort: 8181, MetadataIP: netip.AddrFrom4([4]byte{169, 254, 169, 254}),
		StateDir: DefaultStateDir, Guard: true, Mark: DefaultMark,
	}
	if raw[validKey] != nil && c.Valid == nil {
		c.Valid = []types.GCAttachment{}
	}
	for _, k := range Keys {
		if value, ok := raw[k.Name]; ok {
			if err := k.set(c, value); err != nil {
				return nil, invalid("%s: %v", k.Name, err)
			}
		}
	}
	if c.ProxyIP == c.MetadataIP {
		return nil, invalid("proxyIP: %s is metadataIP too", c.ProxyIP)
	}
	return c, nil
}

// StateDir returns the state directory of a configuration whose other keys may be invalid. DEL
// needs only this key: a DEL that failed for another key would keep the pod's address from being
// released. StateDir returns the default for a value that Parse refuses, because no ADD has used
// that value.
func StateDir(stdin []byte) string {
	c := Config{StateDir: DefaultStateDir}
	if raw, err := decodeObject(stdin); err == nil && raw["stateDir"] != nil {
		_ = text(setStateDir)(&c, raw["stateDir"]) // an invalid value leaves the default
	}
	return c.StateDir
}

func decodeObject(stdin []byte) (map[string]json.RawMessage, error) {
	var raw map[string]json.RawMessage
	if err := json.Unmarshal(stdin, &raw); err != nil {
		return nil, undecodable("network configuration: %v", err)
	}
	if raw == nil {
		return nil, undecodable("network configuration: null is no object")
	}
	return raw, nil
}

func checkKeys(raw map[string]json.RawMessage) error {
	var names, unknown []string
	for _, k := range Keys {
		names = append(names, k.Name)
	}
	for key := range raw {
		if !slices.Contains(names, key) && !slices.Contains(cniKeys, key) && !strings.HasPrefix(key, reservedPrefix) {
			unknown = append(unknown, fmt.Sprintf("%.80q", key))
		}
	}
	if len(unknown) == 0 {
		return nil
	}
	slices.Sort(unknown)
	return invalid("unknown key %s; the plugin's own keys are %s", strings.Join(unknown, ", "), strings.Join(names, ", "))
}

func invalid(format string, args ...any) error {
	return types.NewError(types.ErrInvalidNetworkConfig, fmt.Sprintf(format, args...), "")
}

func undecodable(format string, args ...any) error {
	return types.NewError(types.ErrDecodingFailure, fmt.Sprintf(format, args...), "")
}
