package uplink

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/test/netnstest"
)

// ethernet returns a frame with the given VLAN tags.
func ethernet(source [6]byte, etherType uint16, payload []byte, tags ...uint16) []byte {
	frame := append([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, source[:]...)
	for _, tag := range tags {
		frame = binary.BigEndian.AppendUint32(frame, uint32(tag)<<16)
	}
	frame = binary.BigEndian.AppendUint16(frame, etherType)
	frame = append(frame, payload...)
	return append(frame, make([]byte, max(0, 60-len(frame)))...)
}

// ipv4 returns a packet. fragment is the field with the flags and the offset; options are of 4
// bytes each.
func ipv4(from, to string, protocol byte, fragment uint16, payload []byte, options ...uint32) []byte {
	size := 20 + 4*len(options)
	p := []byte{byte(0x40 | size/4), 0}
	p = binary.BigEndian.AppendUint16(p, uint16(size+len(payload)))
	p = binary.BigEndian.AppendUint16(p, 1)
	p = binary.BigEndian.AppendUint16(p, fragment)
	p = append(p, 64, protocol, 0, 0)
	p = append(p, netip.MustParseAddr(from).AsSlice()...)
	p = append(p, netip.MustParseAddr(to).AsSlice()...)
	for _, o := range options {
		p = binary.BigEndian.AppendUint32(p, o)
	}
	return append(p, payload...)
}

func ipv6(from, to string, next byte, payload []byte) []byte {
	p := binary.BigEndian.AppendUint32(nil, 6<<28)
	p = binary.BigEndian.AppendUint16(p, uint16(len(payload)))
	p = append(p, next, 64)
	p = append(p, netip.MustParseAddr(from).AsSlice()...)
	p = append(p, netip.MustParseAddr(to).AsSlice()...)
	return append(p, payload...)
}

// ports returns a TCP or UDP header that is all zero but for the ports.
func ports(destination uint16) []byte {
	header := binary.BigEndian.AppendUint16(nil, 40000)
	return append(binary.BigEndian.AppendUint16(header, destination), make([]byte, 16)...)
}

// wire sends frames by an interface and reads what arrives at its other end.
type wire struct {
	t        *testing.T
	in, out  int // file descriptors
	sent     unix.SockaddrLinklayer
	control  []byte // a frame that the guard does not concern
	sequence uint64
}

func newWire(t *testing.T, host *netnstest.Netns, link int, out int, control []byte) *wire {
	t.Helper()
	w := &wire{t: t, out: out, sent: unix.SockaddrLinklayer{Ifindex: link, Protocol: 0x3412}, control: control}
	host.Do(func() { w.in = packetSocket(t, 0) })
	return w
}

// capture returns a socket that receives the frames of an interface.
func capture(t *testing.T, ns *netnstest.Netns, link int) (fd int) {
	t.Helper()
	ns.Do(func() {
		fd = packetSocket(t, unix.ETH_P_ALL)
		all := unix.SockaddrLinklayer{Ifindex: link, Protocol: networkOrder(unix.ETH_P_ALL)}
		if err := unix.Bind(fd, &all); err != nil {
			t.Fatal(err)
		}
	})
	return fd
}

// tunnel makes an interface without Ethernet headers, and returns the descriptor of its other end.
func tunnel(t *testing.T, host *netnstest.Netns, name string) (fd int) {
	t.Helper()
	host.Do(func() {
		var err error
		if fd, err = unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		request, err := unix.NewIfreq(name)
		if err != nil {
			t.Fatal(err)
		}
		request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
		if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
			t.Fatal(err)
		}
	})
	return fd
}

// controlType is for experiments (IEEE 802).
const controlType = 0x88b5

func networkOrder(n uint16) uint16 {
	return binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, n))
}

func packetSocket(t *testing.T, protocol uint16) int {
	t.Helper()
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(networkOrder(protocol)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// passes sends a frame and reports whether it arrives before a control frame that is sent after it.
// Both end with a number: the kernel may take a VLAN tag out of a frame that it delivers.
func (w *wire) passes(frame []byte) bool {
	w.t.Helper()
	frame = w.numbered(frame)
	control := w.numbered(w.control)
	for _, f := range [][]byte{frame, control} {
		// ENOBUFS: a program has dropped the frame.
		if err := unix.Sendto(w.in, f, 0, &w.sent); err != nil && !errors.Is(err, unix.ENOBUFS) {
			w.t.Fatal(err)
		}
	}
	arrived := false
	for buffer := make([]byte, 2048); ; {
		n, err := unix.Read(w.out, buffer)
		if err != nil {
			w.t.Fatal(err)
		}
		switch got := buffer[:n]; {
		case bytes.Equal(number(got), number(control)):
			return arrived
		case bytes.Equal(number(got), number(frame)):
			arrived = true
		}
	}
}

func (w *wire) numbered(frame []byte) []byte {
	w.sequence++
	return binary.BigEndian.AppendUint64(slices.Clip(frame), w.sequence)
}

func number(frame []byte) []byte { return frame[max(0, len(frame)-8):] }
