package redirect

import (
	"strings"

	"github.com/google/go-cmp/cmp"
)

// The tables as nft lists them. Those of IPv6 are the same words with another family's (inIPv6).
const (
	ipSets = `table ip kube2iam-cni {
	set metadata {
		type ipv4_addr . inet_service
		elements = {
			169.254.169.254 . 80 comment "kube2iam-cni"
		}
	}

	map routed {
		type ifname . ipv4_addr : ipv4_addr . inet_service
ROUTED	}

	map bridged {
		type ipv4_addr : ipv4_addr . inet_service
BRIDGED	}

ADDRESSES	chain redirections {
		type nat hook prerouting priority dstnat - 10; policy accept;
		ip daddr . tcp dport @metadata dnat ip to iifname . ip saddr map @routed comment "by the veth"
		ip daddr . tcp dport @metadata meta mark & 0x00001000 == 0x00001000 dnat ip to ip saddr map @bridged comment "by the port, mark 0x1000"
	}

`
	ipUnmark = `	chain unmark {
		type filter hook prerouting priority dstnat + 1; policy accept;
		meta mark & 0x00001000 == 0x00001000 meta mark set meta mark & 0xffffefff comment "mark 0x1000"
	}
`
	ipAddresses = `	set addresses {
		type ipv4_addr
		elements = {
			169.254.169.254 comment "kube2iam-cni"
		}
	}

`
	ipGuard = `
	chain backstop {
		type filter hook postrouting priority mangle; policy accept;
		ip daddr @addresses fib saddr type local accept comment "the host's own"
		meta l4proto udp ip daddr @addresses accept comment "UDP passes"
		ip daddr @addresses drop comment "guard"
	}

	chain guard {
		type filter hook forward priority mangle; policy accept;
		ip daddr @addresses reject with tcp reset comment "guard of TCP"
		meta l4proto udp ip daddr @addresses accept comment "UDP passes"
		ip daddr @addresses drop comment "guard"
	}
`
	bridgeSets = `table bridge kube2iam-cni {
	set metadata4 {
		type ipv4_addr . inet_service
		elements = {
			169.254.169.254 . 80 comment "kube2iam-cni"
		}
	}

	set holders4 {
		type ifname . ipv4_addr
HOLDERS4	}

	set held4 {
		type ipv4_addr
HELD4	}

	set metadata6 {
		type ipv6_addr . inet_service
SERVICE6	}

	set holders6 {
		type ifname . ipv6_addr
HOLDERS6	}

	set held6 {
		type ipv6_addr
HELD6	}

	set addresses4 {
		type ipv4_addr
		elements = {
			169.254.169.254 comment "kube2iam-cni"
		}
	}

	set addresses6 {
		type ipv6_addr
ADDRESS6	}

	chain enter {
		type filter hook prerouting priority -350; policy accept;
		@nh,0,16 & 0xfff == 0x0 meta protocol 8021q drop comment "no tag of no network under another"
		@nh,0,16 & 0xfff == 0x0 meta protocol 8021ad drop comment "no tag of no network under another"
		ip6 saddr @addresses6 exthdr frag exists drop comment "no fragments"
		ip6 daddr @addresses6 exthdr frag exists drop comment "no fragments"
		ip daddr . tcp dport @metadata4 iifname . ip saddr @holders4 meta mark set meta mark | 0x00001000 accept comment "own address, mark 0x1000"
		ip daddr . tcp dport @metadata4 ip saddr @held4 drop comment "another's address"
		ip6 daddr . tcp dport @metadata6 iifname . ip6 saddr @holders6 meta mark set meta mark | 0x00001000 accept comment "own address, mark 0x1000"
		ip6 daddr . tcp dport @metadata6 ip6 saddr @held6 drop comment "another's address"
	}

	chain pass {
		type filter hook forward priority -350; policy accept;
GUARD4		ip saddr . tcp sport @metadata4 drop comment "no port answers"
GUARD6		ip6 saddr . tcp sport @metadata6 drop comment "no port answers"
	}

	chain leave {
		type filter hook output priority -350; policy accept;
		ip saddr . tcp sport @metadata4 tcp flags ! rst oifname . ip daddr != @holders4 drop comment "answer to the holder's port only"
		ip6 saddr . tcp sport @metadata6 tcp flags ! rst oifname . ip6 daddr != @holders6 drop comment "answer to the holder's port only"
	}
}
`
	service6   = `fd00:ec2::254 . 80 comment "kube2iam-cni"`
	dropGuard4 = "\t\tmeta l4proto udp ip daddr @addresses4 accept comment \"UDP passes\"\n" +
		"\t\tip daddr @addresses4 drop comment \"guard\"\n"
	dropGuard6 = "\t\tip6 daddr @addresses6 drop comment \"guard\"\n"
)

// elements is how a set's are listed, which are given in order.
func elements(list ...string) string {
	if len(list) == 0 {
		return ""
	}
	return "\t\telements = {\n\t\t\t" + strings.Join(list, "\n\t\t\t") + "\n\t\t}\n"
}

// ipGolden is the table of IPv4 with the elements of its two maps.
func ipGolden(guard bool, routed, bridged string) string {
	addresses, guards := "", ""
	if guard {
		addresses, guards = ipAddresses, ipGuard
	}
	return strings.NewReplacer("BRIDGED", bridged, "ROUTED", routed, "ADDRESSES", addresses).Replace(ipSets) + ipUnmark + guards + "}\n"
}

// inIPv6 is what is said of IPv4, of IPv6.
func inIPv6(golden string) string {
	return strings.NewReplacer("\t\tmeta l4proto udp ip daddr @addresses accept comment \"UDP passes\"\n", "", "table ip ", "table ip6 ", "ipv4_addr", "ipv6_addr", "ip daddr", "ip6 daddr", "ip saddr", "ip6 saddr",
		"dnat ip ", "dnat ip6 ", "169.254.169.254", "fd00:ec2::254", "10.1.0.", "fd00:1::", "192.168.7.2", "fd00:7::2").Replace(golden)
}

// portsGolden are the sets of the table of the bridge family.
type portsGolden struct{ service6, holders4, held4, holders6, held6 string }

func (p portsGolden) table(guard bool) string {
	guard4, guard6 := dropGuard4, dropGuard6
	if !guard {
		guard4, guard6 = "", ""
	}
	return strings.NewReplacer("SERVICE6", p.service6, "ADDRESS6", strings.Replace(p.service6, " . 80", "", 1), "HOLDERS4", p.holders4, "HELD4", p.held4, "HOLDERS6", p.holders6, "HELD6", p.held6,
		"GUARD4", guard4, "GUARD6", guard6).Replace(bridgeSets)
}

// golden puts tables together: bridge, ip, ip6.
func golden(tables ...string) string { return strings.Join(tables, "\n") }

func diff(want, got string) string { return cmp.Diff(want, got) }
