package uplink

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
)

// The program drops TCP packets to port 80 of a metadata service, and every packet to it whose port
// is hidden: fragments after the first, and headers between IP and TCP. It passes packets of the
// node itself: the frame has a hardware address and an IP address of the node.
//
// It reads the frame's bytes, and not the fields of struct __sk_buff that describe them: the sender
// of a raw frame chooses these (packet_snd in net/packet/af_packet.c).

// Verdicts of a program, the same for tcx and for a cls_bpf filter in direct action mode
// (linux/bpf.h, enum tcx_action_base; linux/pkt_cls.h). The program never accepts a packet: this
// would keep the programs after it from seeing it.
const (
	verdictNext = -1
	verdictDrop = 2
)

// ifIndexOffset is the offset of ifindex in struct __sk_buff (linux/bpf.h).
const ifIndexOffset = 40

// The places on the stack.
const (
	stackIfIndex = -4
	stackShort   = -8  // 2 bytes of the packet
	stackSource  = -32 // the source address, 16 bytes
	stackHeader  = -72 // the IP header, 40 bytes
	stackSender  = -84 // a senderKey
)

// maxTags is how many VLAN tags are skipped: two (IEEE 802.1ad).
const maxTags = 2

// objects are the program and what it reads.
type objects struct {
	// Program and Copy are the same. The kernel refuses to attach one program twice to an interface.
	// To move the guard back to the head, the agent attaches the other there and detaches the former.
	Program *ebpf.Program `ebpf:"program"`
	Copy    *ebpf.Program `ebpf:"copy"`

	// Links says by an interface's index whether its frames have an Ethernet header. The program
	// assumes one for an interface that is not in the map.
	Links *ebpf.Map `ebpf:"links"`
	// Senders has the hardware addresses of the node's frames, by interface.
	Senders *ebpf.Map `ebpf:"senders"`
	// Addresses are the node's IP addresses, IPv4 as IPv4-mapped IPv6.
	Addresses *ebpf.Map `ebpf:"addresses"`
}

// program is one of the two, with its ID.
type program struct {
	*ebpf.Program
	id ebpf.ProgramID
}

func (o objects) programs() ([]program, error) {
	var programs []program
	for _, p := range []*ebpf.Program{o.Program, o.Copy} {
		info, err := p.Info()
		if err != nil {
			return nil, err
		}
		id, _ := info.ID()
		programs = append(programs, program{p, id})
	}
	return programs, nil
}

// has reports whether a program that the kernel lists is one of these.
func has(programs []program, id ebpf.ProgramID) bool {
	return slices.ContainsFunc(programs, func(p program) bool { return p.id == id })
}

// senderKey is a key of the map senders.
type senderKey struct {
	IfIndex      uint32
	HardwareAddr [6]byte
	_            [2]byte
}

// maxEntries bounds each map: kube-proxy in IPVS mode gives the node the addresses of all Services.
// The kernel allocates entries as they are added.
const maxEntries = 1 << 16

// newCollection describes the program and its maps. metadata is the IPv4 address of the service.
func newCollection(metadata netip.Addr) *ebpf.CollectionSpec {
	hash := func(name string, keySize uint32) *ebpf.MapSpec {
		return &ebpf.MapSpec{Name: name, Type: ebpf.Hash, KeySize: keySize, ValueSize: 4, MaxEntries: maxEntries, Flags: unix.BPF_F_NO_PREALLOC}
	}
	program := &ebpf.ProgramSpec{Name: programName, Type: ebpf.SchedCLS, License: "Apache-2.0", Instructions: instructions(metadata)}
	return &ebpf.CollectionSpec{
		Maps:     map[string]*ebpf.MapSpec{"links": hash("links", 4), "senders": hash("senders", 12), "addresses": hash("addresses", 16)},
		Programs: map[string]*ebpf.ProgramSpec{"program": program, "copy": program.Copy()},
	}
}

func instructions(metadata netip.Addr) asm.Instructions {
	v6 := attachment.MetadataIPv6.As16()
	var program asm.Instructions
	add := func(more ...asm.Instruction) { program = append(program, more...) }
	label := func(name string, more ...asm.Instruction) {
		more[0] = more[0].WithSymbol(name)
		add(more...)
	}
	// load copies bytes at the offset in R7 to the stack, or jumps if the packet is shorter.
	load := func(to int32, length int32, otherwise string) {
		add(asm.Mov.Reg(asm.R1, asm.R6), asm.Mov.Reg(asm.R2, asm.R7), asm.Mov.Reg(asm.R3, asm.RFP), asm.Add.Imm(asm.R3, to),
			asm.Mov.Imm(asm.R4, length), asm.FnSkbLoadBytes.Call(), asm.JNE.Imm(asm.R0, 0, otherwise))
	}
	// lookup sets R0 to the address of a map's value, or 0.
	lookup := func(name string, key int32) {
		add(asm.LoadMapPtr(asm.R1, 0).WithReference(name), asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, key), asm.FnMapLookupElem.Call())
	}
	field := func(offset int16, size asm.Size) asm.Instruction {
		return asm.LoadMem(asm.R1, asm.RFP, stackHeader+offset, size)
	}

	// R6 is the packet, R7 an offset in it, and R8 whether it has an Ethernet header.
	add(asm.Mov.Reg(asm.R6, asm.R1),
		asm.LoadMem(asm.R1, asm.R6, ifIndexOffset, asm.Word), asm.StoreMem(asm.RFP, stackIfIndex, asm.R1, asm.Word))
	lookup("links", stackIfIndex)
	add(asm.Mov.Imm(asm.R8, 1), asm.JEq.Imm(asm.R0, 0, "ethernet"),
		asm.LoadMem(asm.R8, asm.R0, 0, asm.Word), asm.JNE.Imm(asm.R8, 0, "ethernet"))

	// Without an Ethernet header, the first four bits are IP's version.
	add(asm.Mov.Imm(asm.R7, 0))
	load(stackShort, 1, "next")
	add(asm.LoadMem(asm.R1, asm.RFP, stackShort, asm.Byte), asm.RSh.Imm(asm.R1, 4),
		asm.JEq.Imm(asm.R1, 4, "ipv4"), asm.JEq.Imm(asm.R1, 6, "ipv6"), asm.Ja.Label("next"))

	label("ethernet", asm.Mov.Imm(asm.R7, 12))
	for tag := range maxTags + 1 {
		load(stackShort, 2, "next")
		add(asm.Add.Imm(asm.R7, 2), asm.LoadMem(asm.R1, asm.RFP, stackShort, asm.Half),
			asm.JEq.Imm(asm.R1, big16(unix.ETH_P_IP), "ipv4"), asm.JEq.Imm(asm.R1, big16(unix.ETH_P_IPV6), "ipv6"))
		if tag == maxTags {
			add(asm.Ja.Label("next"))
			break
		}
		isTag := fmt.Sprint("tag", tag)
		add(asm.JEq.Imm(asm.R1, big16(unix.ETH_P_8021Q), isTag), asm.JNE.Imm(asm.R1, big16(unix.ETH_P_8021AD), "next"))
		label(isTag, asm.Add.Imm(asm.R7, 2))
	}

	// IPv4 (RFC 791).
	label("ipv4", asm.Mov.Imm(asm.R0, 0))
	load(stackHeader, 20, "next")
	v4 := metadata.As4()
	add(field(16, asm.Word), asm.LoadImm(asm.R2, int64(binary.NativeEndian.Uint32(v4[:])), asm.DWord), asm.JNE.Reg(asm.R1, asm.R2, "next"),
		asm.StoreImm(asm.RFP, stackSource, 0, asm.Word), asm.StoreImm(asm.RFP, stackSource+4, 0, asm.Word), asm.StoreImm(asm.RFP, stackSource+8, int64(big32(0xffff)), asm.Word),
		field(12, asm.Word), asm.StoreMem(asm.RFP, stackSource+12, asm.R1, asm.Word),
		field(9, asm.Byte), asm.JEq.Imm(asm.R1, unix.IPPROTO_AH, "service"), asm.JEq.Imm(asm.R1, unix.IPPROTO_ESP, "service"),
		asm.JNE.Imm(asm.R1, unix.IPPROTO_TCP, "next"),
		// A fragment after the first has an offset.
		field(6, asm.Half), asm.And.Imm(asm.R1, big16(0x1fff)), asm.JNE.Imm(asm.R1, 0, "service"),
		field(0, asm.Byte), asm.And.Imm(asm.R1, 0x0f), asm.LSh.Imm(asm.R1, 2), asm.Add.Reg(asm.R7, asm.R1),
		asm.Ja.Label("tcp"))

	// IPv6 (RFC 8200).
	label("ipv6", asm.Mov.Imm(asm.R0, 0))
	load(stackHeader, 40, "next")
	add(field(24, asm.DWord), asm.LoadImm(asm.R2, int64(binary.NativeEndian.Uint64(v6[:8])), asm.DWord), asm.JNE.Reg(asm.R1, asm.R2, "next"),
		field(32, asm.DWord), asm.LoadImm(asm.R2, int64(binary.NativeEndian.Uint64(v6[8:])), asm.DWord), asm.JNE.Reg(asm.R1, asm.R2, "next"),
		field(8, asm.DWord), asm.StoreMem(asm.RFP, stackSource, asm.R1, asm.DWord),
		field(16, asm.DWord), asm.StoreMem(asm.RFP, stackSource+8, asm.R1, asm.DWord),
		field(6, asm.Byte), asm.JEq.Imm(asm.R1, unix.IPPROTO_UDP, "next"), asm.JEq.Imm(asm.R1, unix.IPPROTO_ICMPV6, "next"),
		asm.JNE.Imm(asm.R1, unix.IPPROTO_TCP, "service"), // fragments and extension headers
		asm.Add.Imm(asm.R7, 40))

	label("tcp", asm.Add.Imm(asm.R7, 2))
	load(stackShort, 2, "service")
	add(asm.LoadMem(asm.R1, asm.RFP, stackShort, asm.Half), asm.JNE.Imm(asm.R1, big16(attachment.MetadataPort), "next"))

	// The packet is for the service. The node itself may send it.
	label("service", asm.JEq.Imm(asm.R8, 0, "source"))
	add(asm.LoadMem(asm.R1, asm.RFP, stackIfIndex, asm.Word), asm.StoreMem(asm.RFP, stackSender, asm.R1, asm.Word),
		asm.StoreImm(asm.RFP, stackSender+4, 0, asm.Word), asm.StoreImm(asm.RFP, stackSender+8, 0, asm.Word), asm.Mov.Imm(asm.R7, 6))
	load(stackSender+4, 6, "drop")
	lookup("senders", stackSender)
	add(asm.JEq.Imm(asm.R0, 0, "drop"))
	label("source", asm.Mov.Imm(asm.R0, 0))
	lookup("addresses", stackSource)
	add(asm.JNE.Imm(asm.R0, 0, "next"))
	label("drop", asm.Mov.Imm(asm.R0, verdictDrop), asm.Return())
	label("next", asm.Mov.Imm(asm.R0, verdictNext), asm.Return())
	return program
}

// big16 and big32 return the number that a load in native order gives for n in network order.
func big16(n uint16) int32 {
	return int32(binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, n)))
}

func big32(n uint32) int32 {
	return int32(binary.NativeEndian.Uint32(binary.BigEndian.AppendUint32(nil, n)))
}
