package rules

import (
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/nft"
)

// The guard refuses packets to a metadata service that are not redirected: a redirected packet has
// another destination when it reaches the guard. It covers every IP family of the kernel, whether
// or not a pod has an address of it, because a pod with NET_ADMIN can give itself one.

// guardPriority is that of mangle. The position does not weaken the guard: a drop is final in every
// chain, and an accept ends only its own chain.
const guardPriority = -150

// guardSet has the addresses of the metadata services.
func (f *family) guardSet() *nftables.Set {
	return newSet(f.ipTable(), "addresses", f.addrType, false)
}

// guard returns the guard of the given services on the host's IP layer.
func guard(services []netip.AddrPort) nft.Ruleset {
	var rs nft.Ruleset
	for _, f := range []*family{ipv4, ipv6} {
		elements := addressElements(services, f, f.guardSet())
		if len(elements) == 0 {
			continue
		}
		rs.Elements = append(rs.Elements, elements...)
		rs.Tables = append(rs.Tables, nft.Table{
			Table: f.ipTable(), Sets: []*nftables.Set{f.guardSet()},
			Chains: []nft.Chain{f.guardForward(), f.guardPostrouting()},
		})
	}
	return rs
}

// guardForward refuses what is forwarded to a metadata service. It answers TCP with a reset, so an
// SDK sees a closed port instead of a timeout. It also drops what is forwarded from a metadata
// service: the kernel or the network card can write a checksum into a packet after every rule, at a
// place that the sender of a raw frame chooses (PACKET_VNET_HDR, skb_checksum_help in
// net/core/dev.c), and so change its address or port. The answers to redirected requests are the
// host's own and are not forwarded.
func (f *family) guardForward() nft.Chain {
	reset := slices.Concat(matchProtocol(unix.IPPROTO_TCP), f.matchAddr(f.daddr, f.guardSet()), []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}})
	rules := append([]nft.Rule{{Comment: "reset TCP", Exprs: reset}}, f.drop(f.guardSet())...)
	rules = append(rules, f.dropAddr("answers: ", f.saddr, f.guardSet())...)
	return newChain(f.ipTable(), "guard", nftables.ChainTypeFilter, nftables.ChainHookForward, guardPriority, rules...)
}

// guardPostrouting drops packets to a metadata service that pass no forward hook and that the host
// did not send: IPVS sends packets from input to output, and a source route (RFC 791) replaces the
// destination after forward. The chain comes before source NAT, which is applied at priority 100,
// so the source address is still the pod's.
func (f *family) guardPostrouting() nft.Chain {
	local := slices.Concat(f.matchAddr(f.daddr, f.guardSet()), []expr.Any{
		&expr.Fib{Register: register0, FlagSADDR: true, ResultADDRTYPE: true},
		equal(binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)),
		verdict(expr.VerdictAccept),
	})
	rules := append([]nft.Rule{{Comment: "the host's own packets", Exprs: local}}, f.drop(f.guardSet())...)
	return newChain(f.ipTable(), "guard-postrouting", nftables.ChainTypeFilter, nftables.ChainHookPostrouting, guardPriority, rules...)
}

// drop drops packets to the addresses of a set, of every protocol: a fragment, an authentication
// header or an unknown extension header can hide TCP from nftables and not from the receiver. UDP
// over IPv4 passes, because Google's metadata server is the name server at the same address. A UDP
// fragment cannot become part of a TCP segment: RFC 791 reassembles by protocol.
func (f *family) drop(addresses *nftables.Set, match ...expr.Any) []nft.Rule {
	return f.dropAddr("", f.daddr, addresses, match...)
}

// dropAddr is drop for packets whose address at the offset is in a set. The comments begin with a
// prefix.
func (f *family) dropAddr(prefix string, offset uint32, addresses *nftables.Set, match ...expr.Any) []nft.Rule {
	drop := nft.Rule{Comment: prefix + "drop", Exprs: slices.Concat(match, f.matchAddr(offset, addresses), []expr.Any{verdict(expr.VerdictDrop)})}
	if f == ipv6 {
		return []nft.Rule{drop}
	}
	udp := slices.Concat(match, matchProtocol(unix.IPPROTO_UDP), f.matchAddr(offset, addresses), []expr.Any{verdict(expr.VerdictAccept)})
	return []nft.Rule{{Comment: prefix + "UDP passes", Exprs: udp}, drop}
}

// addressElements returns the addresses of the family's services as elements of a set.
func addressElements(services []netip.AddrPort, f *family, set *nftables.Set) []nft.Element {
	var elements []nft.Element
	for _, service := range services {
		if familyOf(service.Addr()) == f {
			elements = append(elements, nft.Element{Set: set, Key: addrBytes(service.Addr()), Owner: NodeOwner, Object: service.Addr().String()})
		}
	}
	return elements
}
