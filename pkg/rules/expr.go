package rules

import (
	"encoding/binary"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/nft"
)

// register returns the number of the n-th 4-byte register. They lie one behind the other, so the
// parts of a concatenated key are loaded in a row. Every fourth has the number of the 16-byte
// register that begins there, as the kernel lists it (nft_dump_register in
// net/netfilter/nf_tables_api.c): this way a rule that is read compares equal to the one that was
// written.
func register(n uint32) uint32 {
	if n%4 == 0 {
		return unix.NFT_REG_1 + n/4
	}
	return unix.NFT_REG32_00 + n
}

var register0 = register(0)

// family is an IP family with its encoding in nftables.
type family struct {
	table        nftables.TableFamily
	etherType    uint16
	saddr, daddr uint32 // offsets in the header (RFC 791, RFC 8200)
	addrLen      uint32
	addrType     nftables.SetDatatype
	suffix       string // of the names of sets in the bridge table, which has both families
}

var (
	ipv4 = &family{table: nftables.TableFamilyIPv4, etherType: unix.ETH_P_IP, saddr: 12, daddr: 16, addrLen: 4,
		addrType: nftables.TypeIPAddr, suffix: "4"}
	ipv6 = &family{table: nftables.TableFamilyIPv6, etherType: unix.ETH_P_IPV6, saddr: 8, daddr: 24, addrLen: 16,
		addrType: nftables.TypeIP6Addr, suffix: "6"}
)

func familyOf(ip netip.Addr) *family {
	if ip.Is6() {
		return ipv6
	}
	return ipv4
}

// addrRegisters is how many 4-byte registers an address takes, and nameRegisters an interface's
// name.
func (f *family) addrRegisters() uint32 { return f.addrLen / 4 }

const nameRegisters = unix.IFNAMSIZ / 4

// socketType is the type of an address and a port, linkAddrType of an interface and an address.
func (f *family) socketType() nftables.SetDatatype {
	return nftables.MustConcatSetType(f.addrType, nftables.TypeInetService)
}
func (f *family) linkAddrType() nftables.SetDatatype {
	return nftables.MustConcatSetType(nftables.TypeIFName, f.addrType)
}

func newSet(t *nftables.Table, name string, key nftables.SetDatatype, concatenated bool) *nftables.Set {
	return &nftables.Set{Table: t, Name: name, KeyType: key, Concatenation: concatenated, KeyByteOrder: binaryutil.BigEndian}
}

func newMap(t *nftables.Table, name string, key, value nftables.SetDatatype, concatenated bool) *nftables.Set {
	s := newSet(t, name, key, concatenated)
	s.IsMap, s.DataType = true, value
	return s
}

func newChain(t *nftables.Table, name string, kind nftables.ChainType, hook *nftables.ChainHook, priority int32, rules ...nft.Rule) nft.Chain {
	accept := nftables.ChainPolicyAccept
	return nft.Chain{Chain: &nftables.Chain{
		Name: name, Table: t, Type: kind, Hooknum: hook, Policy: &accept,
		Priority: nftables.ChainPriorityRef(nftables.ChainPriority(priority)),
	}, Rules: rules}
}

// Keys and values are encoded in whole registers.
func addrBytes(ip netip.Addr) []byte { return ip.AsSlice() }

func portBytes(port uint16) []byte { return binary.BigEndian.AppendUint16(nil, port) }

func socketBytes(a netip.AddrPort) []byte {
	return append(append(addrBytes(a.Addr()), portBytes(a.Port())...), 0, 0)
}

func linkAddrBytes(link string, ip netip.Addr) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, link)
	return append(b, addrBytes(ip)...)
}

// matchFamily matches frames that carry a packet of the family, in a table that sees frames.
func (f *family) matchFamily() []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyPROTOCOL, Register: register0}, equal(portBytes(f.etherType))}
}

func equal(data []byte) expr.Any {
	return &expr.Cmp{Op: expr.CmpOpEq, Register: register0, Data: data}
}

// matchProtocol matches packets by the protocol that nftables finds: in IPv6 the first header that
// is no option, routing or fragment header (net/netfilter/nf_tables_ipv6.h). A packet whose headers
// are incomplete does not match.
func matchProtocol(protocol byte) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: register0}, equal([]byte{protocol})}
}

// matchNoReset matches TCP packets that do not reset the connection (RFC 9293: octet 13 of the
// header has the control bits).
func matchNoReset() []expr.Any {
	const rst = 0x04
	return []expr.Any{
		&expr.Payload{DestRegister: register0, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
		&expr.Bitwise{SourceRegister: register0, DestRegister: register0, Len: 1, Mask: []byte{rst}, Xor: []byte{0}},
		equal([]byte{0}),
	}
}

func (f *family) loadAddr(offset, register uint32) expr.Any {
	return &expr.Payload{DestRegister: register, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: f.addrLen}
}

// matchAddr matches packets whose address at the offset is in a set.
func (f *family) matchAddr(offset uint32, addresses *nftables.Set) []expr.Any {
	return []expr.Any{f.loadAddr(offset, register0), lookup(addresses, false)}
}

func lookup(set *nftables.Set, invert bool) expr.Any {
	return &expr.Lookup{SourceRegister: register0, SetName: set.Name, SetID: set.ID, Invert: invert}
}

// matchDestination and matchSource match TCP packets to and from a socket that is in a set (RFC
// 9293: the header begins with the source and the destination port).
func (f *family) matchDestination(services *nftables.Set) []expr.Any {
	return f.matchSocket(services, f.daddr, 2)
}
func (f *family) matchSource(services *nftables.Set) []expr.Any {
	return f.matchSocket(services, f.saddr, 0)
}

func (f *family) matchSocket(services *nftables.Set, addr, port uint32) []expr.Any {
	return append(matchProtocol(unix.IPPROTO_TCP),
		f.loadAddr(addr, register0),
		&expr.Payload{DestRegister: register(f.addrRegisters()), Base: expr.PayloadBaseTransportHeader, Offset: port, Len: 2},
		lookup(services, false),
	)
}

// matchLinkAddr matches packets whose interface and address are in a set together, or, inverted,
// are not.
func (f *family) matchLinkAddr(link expr.MetaKey, addr uint32, set *nftables.Set, invert bool) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: link, Register: register0},
		f.loadAddr(addr, register(nameRegisters)),
		lookup(set, invert),
	}
}

// translate sends packets to the socket that a map has for the loaded key.
func (f *family) translate(redirects *nftables.Set, loadKey ...expr.Any) []expr.Any {
	return append(loadKey,
		&expr.Lookup{SourceRegister: register0, DestRegister: register0, IsDestRegSet: true, SetName: redirects.Name, SetID: redirects.ID},
		// Every field as the kernel lists it.
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: uint32(f.table), RegAddrMin: register0, RegAddrMax: register0,
			RegProtoMin: register(f.addrRegisters()), RegProtoMax: register(f.addrRegisters()), Specified: true},
	)
}

// matchMark matches packets that have all bits of the mark. setMark and clearMark leave other bits.
func matchMark(mark uint32) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: register0},
		bitwise(mark, 0),
		equal(binaryutil.NativeEndian.PutUint32(mark)),
	}
}

func setMark(mark uint32) []expr.Any   { return writeMark(bitwise(^mark, mark)) }
func clearMark(mark uint32) []expr.Any { return writeMark(bitwise(^mark, 0)) }

func writeMark(change expr.Any) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: register0},
		change,
		&expr.Meta{Key: expr.MetaKeyMARK, Register: register0, SourceRegister: true},
	}
}

func bitwise(mask, xor uint32) expr.Any {
	return &expr.Bitwise{SourceRegister: register0, DestRegister: register0, Len: 4,
		Mask: binaryutil.NativeEndian.PutUint32(mask), Xor: binaryutil.NativeEndian.PutUint32(xor)}
}

func verdict(kind expr.VerdictKind) expr.Any { return &expr.Verdict{Kind: kind} }
