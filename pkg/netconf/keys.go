package netconf

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
)

// DefaultStateDir is on tmpfs, because records describe interfaces and rules that end with a boot.
const DefaultStateDir = "/run/kube2iam-cni"

// DefaultMark is a bit that no program uses which is known to mark packets.
const DefaultMark = 0x1000

// Key is a configuration key of the plugin's entry in a network configuration. It is also a flag
// and an environment variable of the agent, and a value of the chart.
type Key struct {
	Name    string // in JSON
	Flag    string // of the agent
	Default any    // a string, an int or a bool, as in JSON
	Usage   string
	Schema  string // of the chart's value, as JSON Schema

	set func(*Config, json.RawMessage) error
}

// Env returns the agent's environment variable for the key.
func (k Key) Env() string {
	return "KUBE2IAM_AGENT_" + strings.ToUpper(strings.ReplaceAll(k.Flag, "-", "_"))
}

// Keys are the keys that an operator may set. The agent's flags and help, the chart's schema and
// docs/configuration.md are made from them.
var Keys = []Key{
	{"proxyIP", "proxy-ip", "auto",
		"address of the proxy; auto is the node's address towards its default route",
		`{"anyOf": [{"const": "auto"}, {"$ref": "#/definitions/address"}]}`, text(setProxyIP)},
	{"proxyPort", "proxy-port", 8181,
		"port of the proxy, as its --app-port",
		`{"$ref": "#/definitions/port"}`, setProxyPort},
	{"metadataIP", "metadata-ip", "169.254.169.254",
		"IPv4 address of the metadata service that is redirected, as the proxy's --metadata-addr; the IPv6 address is fd00:ec2::254",
		`{"$ref": "#/definitions/address"}`, text(setMetadataIP)},
	{"stateDir", "state-dir", DefaultStateDir,
		"directory of the records, on a tmpfs, as the proxy's --state-dir",
		`{"$ref": "#/definitions/path"}`, text(setStateDir)},
	{"backend", "backend", "auto",
		"nftables, or iptables by the node's command; auto is nftables if the kernel has it",
		`{"enum": ["auto", "nftables", "iptables"]}`, text(setBackend)},
	{"guard", "guard", true,
		"refuse packets to the metadata service that are forwarded without a redirection",
		`{"type": "boolean"}`, setGuard},
	{"mark", "mark", fmt.Sprintf("%#x", DefaultMark),
		"bits of the packet mark that no other program uses, the same in all network configurations of a node; set on bridged packets, with nftables only",
		`{"type": "string", "pattern": "^0x[0-9a-fA-F]+$"}`, text(setMark)},
	{"datapath", "datapath", "auto",
		"pod redirects inside the pod's network namespace; auto does so only for interfaces other than veth",
		`{"enum": ["auto", "pod"]}`, text(setDatapath)},
}

// text returns a setter of a JSON value from one of a string.
func text(set func(*Config, string) error) func(*Config, json.RawMessage) error {
	return func(c *Config, v json.RawMessage) error {
		var s string
		if err := decode(v, "a string", &s); err != nil {
			return err
		}
		return set(c, s)
	}
}

func setProxyIP(c *Config, s string) (err error) {
	if s == "auto" {
		return nil
	}
	// The kernel redirects a pod's packet to 127.0.0.1 only with route_localnet, which opens the
	// node's loopback addresses to pods.
	c.ProxyIP, err = parseUnicast(s)
	return err
}

func setProxyPort(c *Config, v json.RawMessage) error {
	const want = "a port from 1 to 65535"
	if err := decode(v, want, &c.ProxyPort); err != nil {
		return err
	}
	if c.ProxyPort == 0 {
		return fmt.Errorf("0 is not %s", want)
	}
	return nil
}

func setMetadataIP(c *Config, s string) (err error) {
	c.MetadataIP, err = parseUnicast(s)
	if err == nil && !c.MetadataIP.Is4() {
		err = fmt.Errorf("%s is not an IPv4 address", c.MetadataIP)
	}
	return err
}

func setStateDir(c *Config, s string) error {
	if !filepath.IsAbs(s) || filepath.Clean(s) != s || s == "/" || strings.ContainsRune(s, 0) {
		return fmt.Errorf("%.80q is not an absolute, clean path", s)
	}
	c.StateDir = s
	return nil
}

func setBackend(c *Config, s string) (err error) {
	c.Backend, err = autoOr(s, attachment.BackendNFTables, attachment.BackendIPTables)
	return err
}

func setGuard(c *Config, v json.RawMessage) error { return decode(v, "true or false", &c.Guard) }

// setMark accepts a mark as iptables and nft print it: "0x1000".
func setMark(c *Config, s string) error {
	mark, err := strconv.ParseUint(s, 0, 32)
	if err != nil || mark == 0 {
		return fmt.Errorf("%.80q is not a mark from 1 to 0xffffffff", s)
	}
	c.Mark = uint32(mark)
	return nil
}

func setDatapath(c *Config, s string) (err error) {
	c.Datapath, err = autoOr(s, attachment.DatapathPod)
	return err
}

// autoOr returns the value that s names, or "" for "auto".
func autoOr[T ~string](s string, values ...T) (T, error) {
	if s == "auto" {
		return "", nil
	}
	if !slices.Contains(values, T(s)) {
		return "", fmt.Errorf(`%.80q is not "auto" or one of %q`, s, values)
	}
	return T(s), nil
}

// parseUnicast parses an address that pods can reach.
func parseUnicast(s string) (netip.Addr, error) {
	ip, err := netip.ParseAddr(s)
	if err != nil || ip.Zone() != "" || ip.Is4In6() {
		return netip.Addr{}, fmt.Errorf("%.80q is not a plain IP address", s)
	}
	if ip.IsUnspecified() || ip.IsMulticast() || ip.IsLoopback() || ip == netip.AddrFrom4([4]byte{255, 255, 255, 255}) {
		return netip.Addr{}, fmt.Errorf("%s is not the address of a machine that pods can reach", ip)
	}
	return ip, nil
}

// decode decodes one value. It refuses null, which encoding/json would accept and ignore.
func decode(v json.RawMessage, want string, into any) error {
	if string(v) == "null" || json.Unmarshal(v, into) != nil {
		return fmt.Errorf("%.80s is not %s", v, want)
	}
	return nil
}
