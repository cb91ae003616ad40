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

	"github.com/kube2iam-cni/kube2iam-cni/pkg/ipfamily"
)

// Bounds of a record's fields, far above what runtimes and networks use.
const (
	maxIPs   = 32
	maxNetns = 4095 // PATH_MAX without its NUL
)

// ValidateID returns an error if containerID and ifName cannot identify an attachment, and so name
// a file and a rule. The rules are those of the CNI specification, with a bound on the length and
// without bytes that a rule's comment cannot hold.
func ValidateID(containerID, ifName string) error {
	if !validName(containerID) {
		return fmt.Errorf("container ID %.80q: not 1 to 200 of letters, digits, '_', '.' and '-'", containerID)
	}
	if !validInterface(ifName) {
		return fmt.Errorf("interface name %.80q: not a valid name of 1 to 15 bytes", ifName)
	}
	return nil
}

// Validate returns an error that names the first field with a value that ADD does not write. The
// agent and DEL build rules, commands and paths from a record, so every field is checked before a
// record is written and when it is read.
func (r *Record) Validate() error {
	if err := ValidateID(r.ContainerID, r.IfName); err != nil {
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
	return cmp.Or(r.Pod.Validate(), r.validateIPs(), r.validateDatapath(), r.validateRedirects())
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
	// Runtimes that do not pass K8S_POD_UID leave it empty. It is a UUID, or a hash for a static
	// pod.
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
		if !isUnicast(ip) || ip.Is6() && ip.IsLinkLocalUnicast() || ip == MetadataIPv4 || ip == MetadataIPv6 {
			return fmt.Errorf("IP %q: not a pod's address", ip)
		}
		if slices.Contains(r.IPs[:i], ip) {
			return fmt.Errorf("IP %s is listed twice", ip)
		}
	}
	return nil
}

// validateDatapath checks what a rule matches a packet's way into the host by.
func (r *Record) validateDatapath() error {
	l := r.HostLink
	if l.Name != "" && !validHostLink(l.Name) {
		return fmt.Errorf("host interface %.80q: not a valid name", l.Name)
	}
	if l.Bridge != "" && !validHostLink(l.Bridge) {
		return fmt.Errorf("bridge %.80q: not a valid name", l.Bridge)
	}
	if l.Index < 0 || l.Index > math.MaxInt32 || (l.Index == 0) != (l.Name == "") ||
		l.Bridge != "" && l.Name == "" || l.Bridge == l.Name && l.Name != "" {
		return fmt.Errorf("host interface %+v: name, index and bridge contradict each other", l)
	}
	if r.Backend != BackendNFTables && r.Backend != BackendIPTables {
		return fmt.Errorf("backend %.80q: not %q or %q", r.Backend, BackendNFTables, BackendIPTables)
	}
	consistent := false
	switch r.Datapath {
	case DatapathRouted:
		consistent = l.Name != "" && l.Bridge == ""
	case DatapathBridged:
		consistent = l.Bridge != ""
	case DatapathPod:
		consistent = r.Backend == BackendNFTables
	default:
		return fmt.Errorf("datapath %.80q: not %q, %q or %q", r.Datapath, DatapathRouted, DatapathBridged, DatapathPod)
	}
	if !consistent {
		return fmt.Errorf("datapath %q contradicts host interface %+v or backend %q", r.Datapath, l, r.Backend)
	}
	return nil
}

func (r *Record) validateRedirects() error {
	var sources []netip.Addr
	services := make(map[ipfamily.Family]netip.AddrPort)
	for _, redirect := range r.Redirects {
		family := ipfamily.Of(redirect.Source)
		if !slices.Contains(r.IPs, redirect.Source) || slices.Contains(sources, redirect.Source) {
			return fmt.Errorf("redirection from %s: not one of each of the attachment's IPs at most", redirect.Source)
		}
		sources = append(sources, redirect.Source)
		metadata := redirect.Metadata.Addr()
		if !isUnicast(metadata) || ipfamily.Of(metadata) != family || family == ipfamily.IPv6 && metadata != MetadataIPv6 ||
			redirect.Metadata.Port() != MetadataPort || slices.Contains(r.IPs, metadata) {
			return fmt.Errorf("redirection of %s: not a metadata service of the family of %s", redirect.Metadata, redirect.Source)
		}
		// The guard covers one service of a family.
		if other, ok := services[family]; ok && other != redirect.Metadata {
			return fmt.Errorf("redirections of both %s and %s", other, redirect.Metadata)
		}
		services[family] = redirect.Metadata
		proxy := redirect.Proxy.Addr()
		if !isUnicast(proxy) || ipfamily.Of(proxy) != family || redirect.Proxy.Port() == 0 || proxy == metadata {
			return fmt.Errorf("redirection to %s: not a proxy of the family of %s", redirect.Proxy, redirect.Source)
		}
	}
	return nil
}

// isUnicast reports whether ip is an address without a zone that another machine can dial.
func isUnicast(ip netip.Addr) bool {
	return ip.IsValid() && ip.Zone() == "" && !ip.Is4In6() && !ip.IsUnspecified() && !ip.IsLoopback() && !ip.IsMulticast() &&
		ip != netip.AddrFrom4([4]byte{255, 255, 255, 255})
}

// validName applies the CNI specification's rule for container IDs and network names, with a bound
// that lets the name fit into a file name. Compiling a regular expression would take a fifth of the
// plugin's start.
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

// validDNS applies Kubernetes' rule for names: labels of lower-case letters, digits and inner '-',
// separated by dots.
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

// validInterface applies the kernel's rule (dev_valid_name in net/core/dev.c). It allows only
// visible ASCII, without the quotes and the backslash, which have a meaning in a rule's comment.
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

// validHostLink is validInterface without the names that iptables reads as a pattern ("cali+") or
// as an option.
func validHostLink(s string) bool {
	return validInterface(s) && s[0] != '-' && s[0] != '!' && s[len(s)-1] != '+'
}

func validNetns(path string) bool {
	if len(path) > maxNetns || !filepath.IsAbs(path) || filepath.Clean(path) != path || path == "/" {
		return false
	}
	return !strings.ContainsFunc(path, func(r rune) bool { return r < ' ' || r == 0x7f || r == '\ufffd' })
}
