package rules

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/nft"
)

// The binding binds a bridged pod's addresses to its bridge port, in both directions. It is a table
// of the bridge family, which sees a frame by the port that it enters or leaves by; the IP layer
// sees only the bridge. It works with bridge-nf on and off:
//
//   - A request for a metadata service from an address that the port holds is marked for the
//     redirection. One from an address that another port holds is dropped, before bridge, ARP or
//     routing. One from an address that no port holds meets the guard.
//   - An answer of a metadata service leaves only by the port that holds the address. A pod that
//     claims a neighbour's address (ARP, NDP) or MAC address gets none but resets, which carry no
//     data and are the guard's answer to a pod whose address is not bound yet.
//   - No frame from port to port is bound for a metadata service or claims to come from one. So a
//     pod that poses as the gateway can neither forward requests nor answer them.
//
// A chain at the veth's ingress would not do: frames that a tc filter takes elsewhere and brings
// back, as the bandwidth plugin's does, pass the bridge again but not the ingress.

// bindingPriority comes before bridge-nf, which hands frames to the IP layer's rules at 0
// (linux/netfilter_bridge.h, NF_BR_PRI_BRNF), and before ebtables, whose tables begin at -300.
const bindingPriority = -350

func bridgeTable() *nftables.Table {
	return &nftables.Table{Name: Table, Family: nftables.TableFamilyBridge}
}

// portAddressSet has the addresses that are bound, with their ports; boundSet the addresses alone.
func (f *family) portAddressSet() *nftables.Set {
	return newSet(bridgeTable(), "ports"+f.suffix, f.linkAddrType(), true)
}
func (f *family) boundSet() *nftables.Set {
	return newSet(bridgeTable(), "bound"+f.suffix, f.addrType, false)
}
func (f *family) bridgeMetadataSet() *nftables.Set {
	return newSet(bridgeTable(), "metadata"+f.suffix, f.socketType(), true)
}
func (f *family) bridgeGuardSet() *nftables.Set {
	return newSet(bridgeTable(), "addresses"+f.suffix, f.addrType, false)
}

// binding returns the bridge table if one of the records is bridged. It has both IP families,
// because a pod chooses what it sends.
func (s Settings) binding(records []*attachment.Record, services []netip.AddrPort) nft.Ruleset {
	isBridged := func(r *attachment.Record) bool { return r.Datapath == attachment.DatapathBridged }
	if !slices.ContainsFunc(records, isBridged) {
		return nft.Ruleset{}
	}
	t := nft.Table{Table: bridgeTable()}
	prerouting := append(dropPriorityTags(), dropFragments()...)
	var forward, output, guard []nft.Rule
	var elements []nft.Element
	for _, f := range []*family{ipv4, ipv6} {
		metadata, ports, bound := f.bridgeMetadataSet(), f.portAddressSet(), f.boundSet()
		t.Sets = append(t.Sets, metadata, ports, bound, f.bridgeGuardSet())
		toMetadata := append(f.matchFamily(), f.matchDestination(metadata)...)
		fromMetadata := append(f.matchFamily(), f.matchSource(metadata)...)
		fromOwnAddress := slices.Concat(toMetadata, f.matchLinkAddr(expr.MetaKeyIIFNAME, f.saddr, ports, false))
		fromBoundAddress := slices.Concat(toMetadata, f.matchAddr(f.saddr, bound))
		toOtherPort := slices.Concat(fromMetadata, matchNoReset(), f.matchLinkAddr(expr.MetaKeyOIFNAME, f.daddr, ports, true))
		drop := verdict(expr.VerdictDrop)
		prerouting = append(prerouting,
			nft.Rule{Comment: fmt.Sprintf("own address, mark %#x", s.Mark), Exprs: append(slices.Concat(fromOwnAddress, setMark(s.Mark)), verdict(expr.VerdictAccept))},
			nft.Rule{Comment: "another port's address", Exprs: append(fromBoundAddress, drop)})
		forward = append(forward, nft.Rule{Comment: "no port answers", Exprs: append(fromMetadata, drop)})
		output = append(output, nft.Rule{Comment: "answers leave by the bound port", Exprs: append(toOtherPort, drop)})
		guard = append(guard, f.drop(f.bridgeGuardSet(), f.matchFamily()...)...)
		elements = append(elements, serviceElements(services, f, metadata)...)
		elements = append(elements, addressElements(services, f, f.bridgeGuardSet())...)
	}
	t.Chains = []nft.Chain{
		newChain(t.Table, "prerouting", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, bindingPriority, prerouting...),
		newChain(t.Table, "forward", nftables.ChainTypeFilter, nftables.ChainHookForward, bindingPriority, forward...),
		newChain(t.Table, "output", nftables.ChainTypeFilter, nftables.ChainHookOutput, bindingPriority, output...),
	}
	if s.Guard {
		t.Chains = append(t.Chains, newChain(t.Table, "guard", nftables.ChainTypeFilter, nftables.ChainHookForward, bindingPriority, guard...))
	}
	for _, r := range records {
		elements = append(elements, bindingElements(r)...)
	}
	return nft.Ruleset{Tables: []nft.Table{t}, Elements: elements}
}

func bindingElements(r *attachment.Record) []nft.Element {
	if r.Datapath != attachment.DatapathBridged {
		return nil
	}
	var elements []nft.Element
	for _, redirect := range r.Redirects {
		ip := redirect.Source
		f := familyOf(ip)
		object := fmt.Sprintf("binding of %s to %s", ip, r.HostLink.Name)
		elements = append(elements,
			nft.Element{Set: f.portAddressSet(), Key: linkAddrBytes(r.HostLink.Name, ip), Owner: r.ID(), Object: object},
			nft.Element{Set: f.boundSet(), Key: addrBytes(ip), Owner: r.ID(), Object: object})
	}
	return elements
}

// dropPriorityTags drops frames with a VLAN tag of network 0 (IEEE 802.1Q, "priority-tagged") under
// another tag. The kernel removes one tag before the bridge sees the frame. A receiver removes both
// tags of network 0 (__netif_receive_skb_core in net/core/dev.c), so it would accept a packet that
// these rules could not parse. Frames of other VLANs stay: a pod's own interface does not receive
// them.
func dropPriorityTags() []nft.Rule {
	var rules []nft.Rule
	for _, tag := range []uint16{unix.ETH_P_8021Q, unix.ETH_P_8021AD} {
		rules = append(rules, nft.Rule{Comment: "priority tag under another tag", Exprs: []expr.Any{
			&expr.Payload{DestRegister: register0, Base: expr.PayloadBaseNetworkHeader, Offset: 0, Len: 2},
			&expr.Bitwise{SourceRegister: register0, DestRegister: register0, Len: 2, Mask: []byte{0x0f, 0xff}, Xor: []byte{0, 0}},
			equal([]byte{0, 0}),
			// The protocol comes last: nft(8) aborts when it lists a rule that matches a known protocol
			// first and reads the payload at this place after it.
			&expr.Meta{Key: expr.MetaKeyPROTOCOL, Register: register0},
			equal(binary.BigEndian.AppendUint16(nil, tag)),
			verdict(expr.VerdictDrop),
		}})
	}
	return rules
}

// dropFragments drops IPv6 fragments to and from a metadata service: the first can end before the
// TCP header, and no fragment has the ports then (RFC 7112 forbids this; not every kernel refuses
// it). TCP does not fragment. In IPv4 a first fragment has at least 8 bytes, and so the ports.
func dropFragments() []nft.Rule {
	var rules []nft.Rule
	for _, addr := range []uint32{ipv6.saddr, ipv6.daddr} {
		rules = append(rules, nft.Rule{Comment: "no fragments", Exprs: append(ipv6.matchFamily(),
			ipv6.loadAddr(addr, register0),
			&expr.Lookup{SourceRegister: register0, SetName: ipv6.bridgeGuardSet().Name},
			&expr.Exthdr{DestRegister: register0, Type: unix.IPPROTO_FRAGMENT, Offset: 0, Len: 1, Flags: unix.NFT_EXTHDR_F_PRESENT, Op: expr.ExthdrOpIpv6},
			equal([]byte{1}),
			verdict(expr.VerdictDrop),
		)})
	}
	return rules
}
