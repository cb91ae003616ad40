package netconf

import (
	"encoding/json"
	"fmt"
	"net/netip"
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
		`{"anyOf": [{"const": "auto"}, {"$ref": "#/definitions/address"}]}`, setProxyIP},
	{"proxyPort", "proxy-port", 8181,
		"port of the proxy, as its --app-port",
		`{"$ref": "#/definitions/port"}`, setProxyPort},
	{"metadataIP", "metadata-ip", "169.254.169.254",
		"IPv4 address of the metadata service that is redirected; its IPv6 address is fd00:ec2::254",
		`{"$ref": "#/definitions/address"}`, setMetadataIP},
	{"stateDir", "state-dir", DefaultStateDir,
		"directory of the records, on a tmpfs, as the proxy's --state-dir",
		`{"$ref": "#/definitions/path"}`, setStateDir},
	{"backend", "backend", "auto",
		"nftables, or iptables by the node's command; auto is nftables if the kernel has it",
		`{"enum": ["auto", "nftables", "iptables"]}`, setBackend},
	{"guard", "guard", true,
		"refuse packets to the metadata service that are forwarded without a redirection",
		`{"type": "boolean"}`, setGuard},
	{"mark", "mark", fmt.Sprintf("%#x", DefaultMark),
		"bits of the packet mark that no other program uses; set on bridged packets, with nftables only",
		`{"type": "string", "pattern": "^0x[0-9a-fA-F]+$"}`, setMark},
	{"datapath", "datapath", "auto",
		"pod redirects inside the pod's network namespace; auto does so only for interfaces other than veth",
		`{"enum": ["auto", "pod"]}`, setDatapath},
}

func setProxyIP(c *Config, v json.RawMessage) error {
	var s string
	if err := decode(v, `"auto" or an IP address`, &s); err != nil || s == "auto" {
		return err
	}
	ip, err := parseUnicast(s)
	if err != nil {
		return fmt.Errorf(`%w; or "auto"`, err)
	}
	if ip.IsLoopback() {
		// The kernel redirects a pod's packet to 127.0.0.1 only with route_localnet, which opens the
		// node's loopback addresses to pods.
		return fmt.Errorf("%s is a loopback address, which no pod's packet reaches", ip)
	}
	c.ProxyIP = ip
	return nil
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

func setMetadataIP(c *Config, v json.RawMessage) error {
	var s string
	if err := decode(v, "an IPv4 address", &s); err != nil {
		return err
	}
	ip, err := parseUnicast(s)
	if err != nil {
		return err
	}
	if !ip.Is4() || ip.IsLoopback() {
		return fmt.Errorf("%s is not an IPv4 address that pods can dial", ip)
	}
	c.MetadataIP = ip
	return nil
}

func setStateDir(c *Config, v json.RawMessage) error {
	var s string
	if err := decode(v, "a directory", &s); err != nil {
		return err
	}
	if !validStateDir(s) {
		return fmt.Errorf("%s is not an absolute, clean path", quote(s))
	}
	c.StateDir = s
	return nil
}

func setBackend(c *Config, v json.RawMessage) error {
	var s string
	if err := decode(v, "a string", &s); err != nil {
		return err
	}
	switch s {
	case "auto":
		c.Backend = ""
	case "nftables", "iptables":
		c.Backend = attachment.Backend(s)
	default:
		return fmt.Errorf(`%s is not "auto", "nftables" or "iptables"`, quote(s))
	}
	return nil
}

func setGuard(c *Config, v json.RawMessage) error { return decode(v, "true or false", &c.Guard) }

// setMark accepts a number, and a string with a number as iptables and nft print marks: "0x1000".
func setMark(c *Config, v json.RawMessage) error {
	const want = "a mark from 1 to 0xffffffff"
	text := string(v)
	if v[0] == '"' {
		if err := decode(v, want, &text); err != nil {
			return err
		}
	}
	mark, err := strconv.ParseUint(text, 0, 32)
	if err != nil || mark == 0 || strings.Contains(text, "_") {
		return fmt.Errorf("%s is not %s", truncate(string(v)), want)
	}
	c.Mark = uint32(mark)
	return nil
}

func setDatapath(c *Config, v json.RawMessage) error {
	var s string
	if err := decode(v, "a string", &s); err != nil {
		return err
	}
	switch s {
	case "auto":
		c.Datapath = ""
	case string(attachment.DatapathPod):
		c.Datapath = attachment.DatapathPod
	default:
		return fmt.Errorf(`%s is not "auto" or "pod"`, quote(s))
	}
	return nil
}

func parseUnicast(s string) (netip.Addr, error) {
	ip, err := netip.ParseAddr(s)
	if err != nil || ip.Zone() != "" || ip.Is4In6() {
		return netip.Addr{}, fmt.Errorf("%s is not a plain IP address", quote(s))
	}
	if ip.IsUnspecified() || ip.IsMulticast() || ip == netip.AddrFrom4([4]byte{255, 255, 255, 255}) {
		return netip.Addr{}, fmt.Errorf("%s is not the address of one machine", ip)
	}
	return ip, nil
}

// decode decodes one value. It refuses null, which encoding/json would accept and ignore.
func decode(v json.RawMessage, want string, into any) error {
	if string(v) == "null" {
		return fmt.Errorf("null is not %s", want)
	}
	if err := json.Unmarshal(v, into); err != nil {
		return fmt.Errorf("%s is not %s", truncate(string(v)), want)
	}
	return nil
}

func quote(s string) string { return strconv.Quote(truncate(s)) }

// truncate bounds how much of a value an error repeats.
func truncate(s string) string {
	const limit = 80
	if len(s) > limit {
		return s[:limit] + "…"
	}
	return s
}
