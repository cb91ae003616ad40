package attachment

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
)

// Bounds of a record's fields. They are far above what a runtime and a network give to a pod.
const (
	maxIPs   = 32
	maxNetns = 4095 // PATH_MAX without its NUL
)

// metadata4 is the metadata service's default address.
var metadata4 = netip.MustParseAddr("169.254.169.254")

// Valid returns an error if containerID and ifName cannot name an attachment, and so a file and a rule's comment. The rules
// are those of the CNI specification, with a bound on the length and without bytes that a rule's comment cannot hold.
func Valid(id, ifName string) error {
	if !validName(id) {
		return fmt.Errorf("container ID %.80q: not 1 to 200 of letters, digits, '_', '.' and '-'", id)
	}
	if !validInterface(ifName) {
		return fmt.Errorf("interface name %.80q: not a valid name of 1 to 15 bytes", ifName)
	}
	return nil
}

// validate returns an error that names the first field whose value no ADD writes. The agent and DEL build rules, commands and
// paths from a record, so every field is checked both before a record is written and when it is read.
func (r *Record) validate() error {
	if err := Valid(r.ContainerID, r.IfName); err != nil {
		return err
	}
	if !validName(r.Network) {
		return fmt.Errorf("network %.80q: not 1 to 200 of letters, digits, '_', '.' and '-'", r.Network)
	}
	if !validNetns(r.Netns) {
		return fmt.Errorf("network namespace %.80q: not an absolute, clean path", r.Netns)
	}
	if y := r.Created.Year(); y < 1970 || y > 2200 {
		return fmt.Errorf("created in the year %d", y)
	}
	return cmp.Or(r.Pod.Validate(), r.validateIPs(), r.validateLink(), r.validateRedirects())
}

// Validate returns an error if p is neither the zero Pod nor one whose names Kubernetes allows.
func (p Pod) Validate() error {
	if p == (Pod{}) {
		return nil
	}
	if !validDNS(p.Namespace, 63) || strings.Contains(p.Namespace, ".") {
		return fmt.Errorf("pod namespace %.80q: not a DNS label (RFC 1123)", p.Namespace)
	}
	if !validDNS(p.Name, 253) {
		return fmt.Errorf("pod name %.80q: not a DNS subdomain (RFC 1123)", p.Name)
	}
	// Runtimes that do not pass K8S_POD_UID leave it empty. It is a UUID, or a hash for a static pod.
	if p.UID != "" && (len(p.UID) > 128 || !isWord(p.UID, "-")) {
		return fmt.Errorf("pod UID %.80q: not 1 to 128 letters, digits and '-'", p.UID)
	}
	return nil
}

func (r *Record) validateIPs() error {
	if len(r.IPs) == 0 {
		return errors.New("no IP")
	}
	if len(r.IPs) > maxIPs {
		return fmt.Errorf("%d IPs are more than %d", len(r.IPs), maxIPs)
	}
	for i, ip := range r.IPs {
		if !isUnicast(ip) || ip.Is6() && ip.IsLinkLocalUnicast() || ip == metadata4 || ip == MetadataIPv6 {
			return fmt.Errorf("IP %q: not a pod's address", ip)
		}
		if slices.Contains(r.IPs[:i], ip) {
			return fmt.Errorf("IP %s is listed twice", ip)
		}
	}
	return nil
}

// validateLink checks what a rule matches a packet's way into the host by: link, bridge, mark, path and backend.
func (r *Record) validateLink() error {
	l := r.HostLink
	if l.Name != "" && !validHostLink(l.Name) {
		return fmt.Errorf("host interface %.80q: not a valid name", l.Name)
	}
	if l.Bridge != "" && !validHostLink(l.Bridge) {
		return fmt.Errorf("bridge %.80q: not a valid name", l.Bridge)
	}
	if l.Index < 0 || l.Index > math.MaxInt32 || (l.Index == 0) != (l.Name == "") || l.Bridge != "" && l.Name == "" || l.Bridge == l.Name && l.Name != "" {
		return fmt.Errorf("host interface %+v: name, index and bridge contradict each other", l)
	}
	iptables := r.Backend == BackendIPTables || r.Backend == "iptables-nft" || r.Backend == "iptables-legacy"
	if !iptables && r.Backend != "nftables" {
		return fmt.Errorf("backend %.80q: not one that programs rules", r.Backend)
	}
	consistent := false
	switch r.Datapath {
	case DatapathRouted:
		consistent = l.Name != "" && l.Bridge == "" && r.Mark == 0
	case DatapathBridged:
		consistent = l.Bridge != "" && (r.Mark == 0 || iptables)
	case DatapathPod:
		consistent = r.Mark == 0 && !iptables
	default:
		return fmt.Errorf("datapath %.80q: not %q, %q or %q", r.Datapath, DatapathRouted, DatapathBridged, DatapathPod)
	}
	if !consistent {
		return fmt.Errorf("datapath %q contradicts host interface %+v, backend %q or mark %#x", r.Datapath, l, r.Backend, r.Mark)
	}
	return nil
}

func (r *Record) validateRedirects() error {
	var sources []netip.Addr
	services := make(map[bool]netip.AddrPort) // by whether it is IPv6
	for _, one := range r.Redirects {
		if !slices.Contains(r.IPs, one.Source) || slices.Contains(sources, one.Source) {
			return fmt.Errorf("redirection from %s: not one of each of the attachment's IPs at most", one.Source)
		}
		sources = append(sources, one.Source)
		v6 := one.Source.Is6()
		metadata := one.Metadata.Addr()
		if !isUnicast(metadata) || metadata.Is6() != v6 || v6 && metadata != MetadataIPv6 || one.Metadata.Port() != MetadataPort || slices.Contains(r.IPs, metadata) {
			return fmt.Errorf("redirection of %s: not a metadata service of the family of %s", one.Metadata, one.Source)
		}
		// The guard's rules are made for one service of a family.
		if other, known := services[v6]; known && other != one.Metadata {
			return fmt.Errorf("redirections of both %s and %s", other, one.Metadata)
		}
		services[v6] = one.Metadata
		proxy := one.Proxy.Addr()
		if !isUnicast(proxy) || proxy.Is6() != v6 || one.Proxy.Port() == 0 || proxy == metadata {
			return fmt.Errorf("redirection to %s: not a proxy of the family of %s", one.Proxy, one.Source)
		}
	}
	return nil
}

// isUnicast reports whether ip is a plain address that another machine can dial.
func isUnicast(ip netip.Addr) bool {
	return ip.IsValid() && ip.Zone() == "" && !ip.Is4In6() && !ip.IsUnspecified() && !ip.IsLoopback() && !ip.IsMulticast() &&
		ip != netip.AddrFrom4([4]byte{255, 255, 255, 255})
}

// validName applies the CNI specification's rule for container IDs and network names, bounded so that the name always fits into
// a file name. A regular expression would cost a fifth of the plugin's start to compile.
func validName(s string) bool {
	return len(s) <= 200 && s != "" && isAlphanumeric(s[0]) && isWord(s, "_.-")
}

// isWord reports whether s is made of letters, digits and the bytes of others.
func isWord(s, others string) bool {
	for i := range len(s) {
		if !isAlphanumeric(s[i]) && strings.IndexByte(others, s[i]) < 0 {
			return false
		}
	}
	return s != ""
}

func isAlphanumeric(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9'
}

// validDNS applies Kubernetes' rule for names: labels of lower-case letters, digits and inner '-', separated by dots.
func validDNS(s string, max int) bool {
	if len(s) > max || s != strings.ToLower(s) {
		return false
	}
	for label := range strings.SplitSeq(s, ".") {
		if !isWord(label, "-") || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
	}
	return true
}

// validInterface applies the kernel's rule (net/core/dev.c, dev_valid_name), and allows only visible ASCII without the quotes
// and the backslash that iptables-restore and a comment would read as something else.
func validInterface(s string) bool {
	if s == "" || len(s) > 15 || s == "." || s == ".." {
		return false
	}
	for i := range len(s) {
		if c := s[i]; c <= ' ' || c >= 0x7f || strings.IndexByte(`/:"'\`, c) >= 0 {
			return false
		}
	}
	return true
}

// validHostLink is validInterface without the names that iptables reads as a pattern ("cali+") or as an option.
func validHostLink(s string) bool {
	return validInterface(s) && s[0] != '-' && s[0] != '!' && s[len(s)-1] != '+'
}

func validNetns(path string) bool {
	if len(path) > maxNetns || !filepath.IsAbs(path) || filepath.Clean(path) != path || path == "/" {
		return false
	}
	return !strings.ContainsFunc(path, func(r rune) bool { return r < ' ' || r == 0x7f || r == '\ufffd' })
}
