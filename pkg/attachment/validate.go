package attachment

import (
	"cmp"
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
	if p.UID != "" && (len(p.UID) > 128 || !consistsOf(p.UID, letters+"-")) {
		return fmt.Errorf("pod UID %.80q: not 1 to 128 letters, digits and '-'", p.UID)
	}
	return nil
}

func (r *Record) validateIPs() error {
	if len(r.IPs) == 0 || len(r.IPs) > maxIPs {
		return fmt.Errorf("%d IPs: not 1 to %d", len(r.IPs), maxIPs)
	}
	for i, ip := range r.IPs {
		if !isUnicast(ip) || ip == MetadataIPv4 || ip == MetadataIPv6 {
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
	if l != (HostLink{}) && (!validHostLink(l.Name) || l.Index <= 0 || l.Index > math.MaxInt32 ||
		l.Bridge != "" && !validHostLink(l.Bridge) || l.Bridge == l.Name) {
		return fmt.Errorf("host interface %.80q, index %d, port of %.80q: not a valid interface", l.Name, l.Index, l.Bridge)
	}
	if r.Backend != BackendNFTables && r.Backend != BackendIPTables {
		return fmt.Errorf("backend %.80q: not %q or %q", r.Backend, BackendNFTables, BackendIPTables)
	}
	if r.Datapath == DatapathRouted && l.Name != "" && l.Bridge == "" || r.Datapath == DatapathBridged && l.Bridge != "" ||
		r.Datapath == DatapathPod && r.Backend == BackendNFTables {
		return nil
	}
	return fmt.Errorf("datapath %.80q: unknown, or contradicts host interface %+v or backend %q", r.Datapath, l, r.Backend)
}

func (r *Record) validateRedirects() error {
	for i, redirect := range r.Redirects {
		source, metadata, proxy := redirect.Source, redirect.Metadata.Addr(), redirect.Proxy.Addr()
		family := ipfamily.Of(source)
		if !slices.Contains(r.IPs, source) {
			return fmt.Errorf("redirection from %.80q: not an address of the attachment", source)
		}
		if !isUnicast(metadata) || ipfamily.Of(metadata) != family || family == ipfamily.IPv6 && metadata != MetadataIPv6 ||
			redirect.Metadata.Port() != MetadataPort || slices.Contains(r.IPs, metadata) {
			return fmt.Errorf("redirection of %.80q: not a metadata service of the family of %s", redirect.Metadata, source)
		}
		if !isUnicast(proxy) || ipfamily.Of(proxy) != family || redirect.Proxy.Port() == 0 || proxy == metadata {
			return fmt.Errorf("redirection to %.80q: not a proxy of the family of %s", redirect.Proxy, source)
		}
		for _, other := range r.Redirects[:i] {
			// The guard covers one service of a family.
			if other.Source == source || ipfamily.Of(other.Source) == family && other.Metadata != redirect.Metadata {
				return fmt.Errorf("redirections %+v and %+v contradict each other", other, redirect)
			}
		}
	}
	return nil
}

// isUnicast reports whether ip is an address without a zone that another machine can dial.
func isUnicast(ip netip.Addr) bool {
	return ip.Zone() == "" && !ip.Is4In6() && (ip.IsGlobalUnicast() || ip.Is4() && ip.IsLinkLocalUnicast())
}

const (
	lowerCase = "abcdefghijklmnopqrstuvwxyz0123456789"
	letters   = lowerCase + "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
)

// consistsOf reports whether s is not empty and has only characters of the set.
func consistsOf(s, set string) bool { return s != "" && strings.Trim(s, set) == "" }

// validName applies the CNI specification's rule for container IDs and network names, with a bound
// that lets the name fit into a file name.
func validName(s string) bool {
	return len(s) <= 200 && consistsOf(s, letters+"_.-") && consistsOf(s[:1], letters)
}

// validDNS applies Kubernetes' rule for names: labels of lower-case letters, digits and inner '-',
// separated by dots.
func validDNS(s string, max int) bool {
	for label := range strings.SplitSeq(s, ".") {
		if !consistsOf(label, lowerCase+"-") || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
	}
	return len(s) <= max
}

// validInterface applies the kernel's rule (dev_valid_name in net/core/dev.c). It allows only
// visible ASCII, without the quotes and the backslash, which have a meaning in a rule's comment.
func validInterface(s string) bool {
	return len(s) <= 15 && s != "." && s != ".." && consistsOf(s, letters+"!#$%&()*+,-.;<=>?@[]^_`{|}~")
}

// validHostLink is validInterface without the names that iptables reads as a pattern ("cali+") or
// as an option.
func validHostLink(s string) bool {
	return validInterface(s) && s[0] != '-' && s[0] != '!' && s[len(s)-1] != '+'
}

func validNetns(path string) bool {
	return len(path) <= maxNetns && filepath.IsAbs(path) && filepath.Clean(path) == path && path != "/" &&
		!strings.ContainsFunc(path, func(r rune) bool { return r < ' ' || r == 0x7f || r == '\ufffd' })
}
