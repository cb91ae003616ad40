package redirect

import (
	"encoding/binary"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// reg is the n-th of the 16 registers of 4 bytes that lie one behind the other, so that a key of several parts is put together
// in a row. Each fourth is called by the number of the one of 16 bytes that begins there, as the kernel does when it lists a
// rule (net/netfilter/nf_tables_api.c, nft_dump_register): so what was written and what is read can be compared.
func reg(n uint32) uint32 {
	if n%4 == 0 {
		return unix.NFT_REG_1 + n/4
	}
	return unix.NFT_REG32_00 + n
}

var reg0 = reg(0)

// family is an IP version, as nftables has it.
type family struct {
	v6           bool
	table        nftables.TableFamily
	etherType    uint16
	saddr, daddr uint32 // offsets in the header (RFC 791, RFC 8200)
	addrLen      uint32
	addr         nftables.SetDatatype
	suffix       string // of the names of sets that stand in one table for both
}

var (
	family4 = &family{table: nftables.TableFamilyIPv4, etherType: unix.ETH_P_IP, saddr: 12, daddr: 16, addrLen: 4, addr: nftables.TypeIPAddr, suffix: "4"}
	family6 = &family{v6: true, table: nftables.TableFamilyIPv6, etherType: unix.ETH_P_IPV6, saddr: 8, daddr: 24, addrLen: 16, addr: nftables.TypeIP6Addr, suffix: "6"}
)

func familyOf(ip netip.Addr) *family {
	if ip.Is6() {
		return family6
	}
	return family4
}

// regs is how many registers of 4 bytes an address takes.
func (f *family) regs() uint32 { return f.addrLen / 4 }

// nameRegs is how many an interface's name takes.
const nameRegs = unix.IFNAMSIZ / 4

// What a set's key or a map's value is made of.
func (f *family) socket() nftables.SetDatatype { return concat(f.addr, nftables.TypeInetService) }
func (f *family) holder() nftables.SetDatatype { return concat(nftables.TypeIFName, f.addr) }

func concat(types ...nftables.SetDatatype) nftables.SetDatatype {
	return nftables.MustConcatSetType(types...)
}

func set(t *nftables.Table, name string, key nftables.SetDatatype, concatenated bool) *nftables.Set {
	return &nftables.Set{Table: t, Name: name, KeyType: key, Concatenation: concatenated, KeyByteOrder: binaryutil.BigEndian}
}

func mapping(t *nftables.Table, name string, key, value nftables.SetDatatype, concatenated bool) *nftables.Set {
	s := set(t, name, key, concatenated)
	s.IsMap, s.DataType = true, value
	return s
}

// The bytes of a key or a value: each part fills whole registers.
func addrBytes(ip netip.Addr) []byte { return ip.AsSlice() }

func socketBytes(a netip.AddrPort) []byte {
	return append(addrBytes(a.Addr()), byte(a.Port()>>8), byte(a.Port()), 0, 0)
}

func nameBytes(name string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return b
}

func holderBytes(link string, ip netip.Addr) []byte { return append(nameBytes(link), addrBytes(ip)...) }

// isFamily is for a table that sees frames: the frame is a packet of the family.
func (f *family) isFamily() []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyPROTOCOL, Register: reg0},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg0, Data: binary.BigEndian.AppendUint16(nil, f.etherType)},
	}
}

func isTCP() []expr.Any { return isProtocol(unix.IPPROTO_TCP) }

// isProtocol matches packets by the protocol that nftables finds: in IPv6 the first header that is neither an option, a
// routing nor a fragment header (net/netfilter/nf_tables_ipv6.h). It matches no packet whose headers are incomplete.
func isProtocol(protocol byte) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg0},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg0, Data: []byte{protocol}},
	}
}

// noReset matches TCP packets that do not reset the connection (RFC 9293: the control bits are the header's octet 13).
func noReset() []expr.Any {
	const rst = 0x04
	return []expr.Any{
		&expr.Payload{DestRegister: reg0, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
		&expr.Bitwise{SourceRegister: reg0, DestRegister: reg0, Len: 1, Mask: []byte{rst}, Xor: []byte{0}},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg0, Data: []byte{0}},
	}
}

func (f *family) load(offset, register uint32) expr.Any {
	return &expr.Payload{DestRegister: register, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: f.addrLen}
}

// toAddress matches every packet to an address that is in a set.
func (f *family) toAddress(addresses *nftables.Set) []expr.Any {
	return []expr.Any{f.load(f.daddr, reg0), &expr.Lookup{SourceRegister: reg0, SetName: addresses.Name, SetID: addresses.ID}}
}

// toService and fromService match TCP packets to and from a socket that is in a set (RFC 9293, "Header Format": source and
// destination port are the first of the header).
func (f *family) toService(services *nftables.Set) []expr.Any {
	return f.service(services, f.daddr, 2)
}
func (f *family) fromService(services *nftables.Set) []expr.Any {
	return f.service(services, f.saddr, 0)
}

func (f *family) service(services *nftables.Set, addr, port uint32) []expr.Any {
	return append(isTCP(),
		f.load(addr, reg0),
		&expr.Payload{DestRegister: reg(f.regs()), Base: expr.PayloadBaseTransportHeader, Offset: port, Len: 2},
		&expr.Lookup{SourceRegister: reg0, SetName: services.Name, SetID: services.ID},
	)
}

// held matches packets whose interface and address are together in a set, or, inverted, are not.
func (f *family) held(name expr.MetaKey, addr uint32, holders *nftables.Set, invert bool) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: name, Register: reg0},
		f.load(addr, reg(nameRegs)),
		&expr.Lookup{SourceRegister: reg0, SetName: holders.Name, SetID: holders.ID, Invert: invert},
	}
}

// dnat sends packets to the socket that a map has for what the key loads.
func (f *family) dnat(redirects *nftables.Set, key ...expr.Any) []expr.Any {
	return append(key,
		&expr.Lookup{SourceRegister: reg0, DestRegister: reg0, IsDestRegSet: true, SetName: redirects.Name, SetID: redirects.ID},
		// All of it as the kernel lists it.
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: uint32(f.table), RegAddrMin: reg0, RegAddrMax: reg0,
			RegProtoMin: reg(f.regs()), RegProtoMax: reg(f.regs()), Specified: true},
	)
}

// marked matches packets that have all bits of the mark; setMark and clearMark leave the other bits alone.
func marked(mark uint32) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: reg0},
		bits(mark, 0),
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg0, Data: binaryutil.NativeEndian.PutUint32(mark)},
	}
}

func setMark(mark uint32) []expr.Any   { return writeMark(bits(^mark, mark)) }
func clearMark(mark uint32) []expr.Any { return writeMark(bits(^mark, 0)) }

func writeMark(change expr.Any) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: reg0},
		change,
		&expr.Meta{Key: expr.MetaKeyMARK, Register: reg0, SourceRegister: true},
	}
}

func bits(mask, xor uint32) expr.Any {
	return &expr.Bitwise{SourceRegister: reg0, DestRegister: reg0, Len: 4,
		Mask: binaryutil.NativeEndian.PutUint32(mask), Xor: binaryutil.NativeEndian.PutUint32(xor)}
}

func verdict(kind expr.VerdictKind) expr.Any { return &expr.Verdict{Kind: kind} }
