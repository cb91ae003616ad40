package netconf

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
)

// field is one key that the plugin reads, and how its value becomes a valid setting.
type field struct {
	key string
	set func(json.RawMessage) error
}

// fields lists the plugin's own keys, in the order in which they are documented.
func (c *Config) fields() []field {
	return []field{
		{"proxyIP", c.setProxyIP},
		{"proxyPort", c.setProxyPort},
		{"metadataIP", c.setMetadataIP},
		{"stateDir", c.setStateDir},
		{"backend", c.setBackend},
		{"guard", func(v json.RawMessage) error { return decode(v, "true or false", &c.Guard) }},
		{"mark", c.setMark},
		{"path", c.setPath},
	}
}

// injected lists what the plugin reads of the keys that a runtime writes.
func (c *Config) injected() []field {
	return []field{
		{"name", func(v json.RawMessage) error { return decode(v, "a string", &c.Name) }},
		{"cni.dev/valid-attachments", c.setValid},
	}
}

func (c *Config) setProxyIP(v json.RawMessage) error {
	var s string
	if err := decode(v, `"auto" or an IP address`, &s); err != nil {
		return err
	}
	if s == "auto" {
		return nil
	}
	ip, err := unicast(s)
	if err != nil {
		return fmt.Errorf(`%w; or "auto"`, err)
	}
	if ip.IsLoopback() {
		// A pod's packet can be redirected to 127.0.0.1 only with route_localnet, which opens the node's loopback to it.
		return fmt.Errorf("%s is a loopback address, which no pod's packet reaches", ip)
	}
	c.ProxyIP = ip
	return nil
}

func (c *Config) setProxyPort(v json.RawMessage) error {
	const want = "a port from 1 to 65535"
	var n json.Number
	if err := decode(v, want, &n); err != nil {
		return err
	}
	port, err := strconv.ParseUint(string(n), 10, 16)
	// A json.Number also takes a string that holds a number.
	if err != nil || port == 0 || v[0] == '"' {
		return fmt.Errorf("%s is not %s", shortJSON(v), want)
	}
	c.ProxyPort = uint16(port)
	return nil
}

func (c *Config) setMetadataIP(v json.RawMessage) error {
	var s string
	if err := decode(v, "an IPv4 address", &s); err != nil {
		return err
	}
	ip, err := unicast(s)
	if err != nil {
		return err
	}
	if !ip.Is4() || ip.IsLoopback() {
		return fmt.Errorf("%s is not an IPv4 address that pods can dial", ip)
	}
	c.MetadataIP = ip
	return nil
}

func (c *Config) setStateDir(v json.RawMessage) error {
	var s string
	if err := decode(v, "a directory", &s); err != nil {
		return err
	}
	if !validStateDir(s) {
		return fmt.Errorf("%s is not an absolute, clean path", short(s))
	}
	c.StateDir = s
	return nil
}

func (c *Config) setBackend(v json.RawMessage) error {
	var s string
	if err := decode(v, "a string", &s); err != nil {
		return err
	}
	switch b := Backend(s); b {
	case Auto, IPTables, IPTablesNFT, IPTablesLegacy, NFTables:
		c.Backend = b
		return nil
	default:
		return fmt.Errorf(`%s is not "auto", "iptables", "iptables-nft", "iptables-legacy" or "nftables"`, short(s))
	}
}

// setMark takes a number, or a string that holds one as people write marks: "0x1000".
func (c *Config) setMark(v json.RawMessage) error {
	const want = "a mark from 1 to 0xffffffff"
	text := string(v)
	if len(v) > 0 && v[0] == '"' {
		if err := decode(v, want, &text); err != nil {
			return err
		}
	}
	mark, err := strconv.ParseUint(text, 0, 32)
	if err != nil || mark == 0 || strings.Contains(text, "_") {
		return fmt.Errorf("%s is not %s", shortJSON(v), want)
	}
	c.Mark = uint32(mark)
	return nil
}

func (c *Config) setPath(v json.RawMessage) error {
	var s string
	if err := decode(v, "a string", &s); err != nil {
		return err
	}
	if p := Path(s); p != AutoPath && p != Netns {
		return fmt.Errorf(`%s is not "auto" or "netns"`, short(s))
	}
	c.Path = Path(s)
	return nil
}

func (c *Config) setValid(v json.RawMessage) error {
	if err := decodeNull(v, "a list of attachments", &c.Valid); err != nil {
		return err
	}
	if c.Valid == nil {
		// libcni writes null for an empty list.
		c.Valid = []types.GCAttachment{}
	}
	return nil
}

// unicast reads the plain address of one machine.
func unicast(s string) (netip.Addr, error) {
	ip, err := netip.ParseAddr(s)
	if err != nil || ip.Zone() != "" || ip.Is4In6() {
		return netip.Addr{}, fmt.Errorf("%s is not a plain IP address", short(s))
	}
	if ip.IsUnspecified() || ip.IsMulticast() || ip == netip.AddrFrom4([4]byte{255, 255, 255, 255}) {
		return netip.Addr{}, fmt.Errorf("%s is not the address of one machine", ip)
	}
	return ip, nil
}

// decode reads one value. A null is refused: encoding/json would take it for "leave as it is", and whoever wrote it meant
// something else.
func decode(v json.RawMessage, want string, into any) error {
	if string(v) == "null" {
		return fmt.Errorf("null is not %s", want)
	}
	return decodeNull(v, want, into)
}

func decodeNull(v json.RawMessage, want string, into any) error {
	if err := json.Unmarshal(v, into); err != nil {
		return fmt.Errorf("%s is not %s", shortJSON(v), want)
	}
	return nil
}

// maxShown bounds what an error repeats of a value.
const maxShown = 80

func short(s string) string { return strconv.Quote(cut(s)) }

func shortJSON(v json.RawMessage) string { return cut(string(v)) }

func cut(s string) string {
	if len(s) > maxShown {
		return s[:maxShown] + "…"
	}
	return s
}
