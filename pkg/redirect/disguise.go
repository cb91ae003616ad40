package redirect

import (
	"encoding/binary"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Frames in which the bridge's rules would not find the packet that their receiver finds.

// hiddenTags drops a frame with a VLAN tag of no network (ID 0, IEEE 802.1Q, "priority-tagged") under another tag. The kernel
// takes one tag off before the bridge, so a frame with one is seen through; whoever receives two of network 0 takes off both
// (net/core/dev.c, __netif_receive_skb_core). Tags of networks are left alone: a pod's own interface does not receive them.
func hiddenTags() []nftRule {
	var rules []nftRule
	for _, tag := range []uint16{unix.ETH_P_8021Q, unix.ETH_P_8021AD} {
		rules = append(rules, nftRule{"no tag of no network under another", []expr.Any{
			&expr.Payload{DestRegister: reg0, Base: expr.PayloadBaseNetworkHeader, Offset: 0, Len: 2},
			&expr.Bitwise{SourceRegister: reg0, DestRegister: reg0, Len: 2, Mask: []byte{0x0f, 0xff}, Xor: []byte{0, 0}},
			&expr.Cmp{Op: expr.CmpOpEq, Register: reg0, Data: []byte{0, 0}},
			// Last: nft aborts over a rule that it knows the protocol of, and that looks where this one does.
			&expr.Meta{Key: expr.MetaKeyPROTOCOL, Register: reg0},
			&expr.Cmp{Op: expr.CmpOpEq, Register: reg0, Data: binary.BigEndian.AppendUint16(nil, tag)},
			verdict(expr.VerdictDrop),
		}})
	}
	return rules
}

// fragments drops fragments of IPv6 to and from the service: the first may end before the TCP header, and the ports are told by
// none then (RFC 7112 forbids such, and not every kernel refuses them). TCP does not fragment. In IPv4 a first fragment always
// has the ports, for it has 8 bytes at least.
func fragments() []nftRule {
	var rules []nftRule
	for _, addr := range []uint32{family6.saddr, family6.daddr} {
		rules = append(rules, nftRule{"no fragments", append(family6.isFamily(),
			family6.load(addr, reg0),
			&expr.Lookup{SourceRegister: reg0, SetName: family6.bridgeAddresses().Name},
			&expr.Exthdr{DestRegister: reg0, Type: unix.IPPROTO_FRAGMENT, Offset: 0, Len: 1, Flags: unix.NFT_EXTHDR_F_PRESENT, Op: expr.ExthdrOpIpv6},
			&expr.Cmp{Op: expr.CmpOpEq, Register: reg0, Data: []byte{1}},
			verdict(expr.VerdictDrop),
		)})
	}
	return rules
}
