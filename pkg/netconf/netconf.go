// Package netconf reads what a container runtime hands to the plugin: the network configuration on standard input, and
// CNI_ARGS.
//
// What it returns is valid as a whole. Every error is a *types.Error with the code of the CNI specification ("Error"), and
// names the key and the value.
package netconf

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/types/create"
	"github.com/containernetworking/cni/pkg/version"
)

// Backend is the configured way of programming rules.
type Backend string

const (
	// Auto is nftables if the kernel has it, else iptables-legacy.
	Auto Backend = "auto"
	// IPTables is what the node's command of that name is.
	IPTables Backend = "iptables"
	// IPTablesNFT is iptables in its nft form, or nothing.
	IPTablesNFT Backend = "iptables-nft"
	// IPTablesLegacy is iptables in its legacy form, or nothing.
	IPTablesLegacy Backend = "iptables-legacy"
	// NFTables is netlink, without a command.
	NFTables Backend = "nftables"
)

// Path is where redirections are made.
type Path string

const (
	// AutoPath is the host, and the pod only where its packets do not pass the host's rules.
	AutoPath Path = "auto"
	// Netns is the pod's own network namespace.
	Netns Path = "netns"
)

// DefaultMark is a bit that no program uses which is known to mark packets (redirect.DefaultMark).
const DefaultMark = 0x1000

// DefaultStateDir is where the records are kept unless the configuration says otherwise: on tmpfs, because they speak of
// interfaces and rules that do not outlive the kernel either.
const DefaultStateDir = "/run/kube2iam-cni"

// Config is one network configuration.
type Config struct {
	// CNIVersion is the version that the result must have; "0.1.0" where the configuration names none.
	CNIVersion string
	// Name is the network's.
	Name string

	// ProxyIP is where redirected connections go. It is the zero Addr for "auto": the node's own address towards its default
	// route, of the family at hand.
	ProxyIP    netip.Addr
	ProxyPort  uint16
	MetadataIP netip.Addr // an IPv4 address
	StateDir   string     // absolute and clean
	Backend    Backend
	Guard      bool
	Mark       uint32 // never 0
	Path       Path

	// PrevResult is nil where the runtime gave none.
	PrevResult types.Result
	// Valid is the attachments that a GC must leave alone. It is nil where the runtime did not say which those are, and empty
	// where it said that there are none.
	Valid []types.GCAttachment
}

// known lists the keys that are not the plugin's own: those of the CNI specification ("Plugin configuration objects",
// "Deriving execution configuration"), and "args", its convention for dynamic arguments (CONVENTIONS.md).
var known = []string{
	"args", "capabilities", "cniVersion", "dns", "ipam", "name", "prevResult", "runtimeConfig", "type",
}

// reserved is the prefix of keys that runtimes inject as the specification grows: no operator has written one.
const reserved = "cni.dev/"

// Parse reads a network configuration strictly: an unknown key, a value of the wrong type and a value out of range are
// errors with code 7, text that is no JSON object is one with code 6.
func Parse(stdin []byte) (*Config, error) {
	raw, err := object(stdin)
	if err != nil {
		return nil, err
	}
	if err := refuseUnknown(raw); err != nil {
		return nil, err
	}
	c := &Config{
		ProxyPort:  8181,
		MetadataIP: netip.MustParseAddr("169.254.169.254"),
		StateDir:   DefaultStateDir,
		Backend:    Auto,
		Guard:      true,
		Mark:       DefaultMark,
		Path:       AutoPath,
	}
	for _, f := range append(c.fields(), c.injected()...) {
		value, given := raw[f.key]
		if !given {
			continue
		}
		if err := f.set(value); err != nil {
			return nil, invalid("%s: %v", f.key, err)
		}
	}
	if c.ProxyIP == c.MetadataIP {
		return nil, invalid("proxyIP: %s is metadataIP too", c.ProxyIP)
	}
	if c.CNIVersion, err = create.DecodeVersion(stdin); err != nil {
		return nil, decoding("cniVersion: %v", err)
	}
	if c.PrevResult, err = prevResult(c.CNIVersion, raw["prevResult"]); err != nil {
		return nil, err
	}
	return c, nil
}

// StateDir is the state directory of a configuration that may be wrong otherwise: teardown needs nothing else of it, and
// a DEL that fails for a typing error would keep the pod's address from being released. A value that Parse refuses is the
// default: no ADD can have used it.
func StateDir(stdin []byte) string {
	c := &Config{StateDir: DefaultStateDir}
	if raw, err := object(stdin); err == nil && raw["stateDir"] != nil && c.setStateDir(raw["stateDir"]) != nil {
		return DefaultStateDir
	}
	return c.StateDir
}

func object(stdin []byte) (map[string]json.RawMessage, error) {
	var raw map[string]json.RawMessage
	if err := json.Unmarshal(stdin, &raw); err != nil {
		return nil, decoding("network configuration: %v", err)
	}
	if raw == nil {
		return nil, decoding("network configuration: null is no object")
	}
	return raw, nil
}

func refuseUnknown(raw map[string]json.RawMessage) error {
	var own []string
	for _, f := range new(Config).fields() {
		own = append(own, f.key)
	}
	var unknown []string
	for key := range raw {
		if !slices.Contains(own, key) && !slices.Contains(known, key) && !strings.HasPrefix(key, reserved) {
			unknown = append(unknown, short(key))
		}
	}
	if len(unknown) == 0 {
		return nil
	}
	slices.Sort(unknown)
	return invalid("unknown key %s; the plugin's own keys are %s", strings.Join(unknown, ", "), strings.Join(own, ", "))
}

// prevResult decodes the result of the plugins before this one, in the version that the configuration has.
func prevResult(cniVersion string, raw json.RawMessage) (types.Result, error) {
	conf := &types.PluginConf{CNIVersion: cniVersion}
	if raw == nil {
		return nil, nil
	}
	if err := json.Unmarshal(raw, &conf.RawPrevResult); err != nil {
		return nil, decoding("prevResult: %v", err)
	}
	if err := version.ParsePrevResult(conf); err != nil {
		return nil, decoding("prevResult: %v", err)
	}
	return conf.PrevResult, nil
}

func invalid(format string, args ...any) error {
	return types.NewError(types.ErrInvalidNetworkConfig, fmt.Sprintf(format, args...), "")
}

func decoding(format string, args ...any) error {
	return types.NewError(types.ErrDecodingFailure, fmt.Sprintf(format, args...), "")
}

func validStateDir(dir string) bool {
	return filepath.IsAbs(dir) && filepath.Clean(dir) == dir && dir != "/" && !strings.ContainsRune(dir, 0)
}
