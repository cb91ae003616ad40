package uplink

import (
	"encoding/binary"
	"log/slog"
	"net"
	"net/netip"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/rules"
	"github.com/kube2iam-cni/kube2iam-cni/test/netnstest"
)

// sum returns the one's complement sum of data (RFC 1071).
func sum(data []byte) uint32 {
	var total uint32
	for i := 0; i < len(data); i += 2 {
		total += uint32(data[i]) << 8
		if i+1 < len(data) {
			total += uint32(data[i+1])
		}
	}
	for total > 0xffff {
		total = total>>16 + total&0xffff
	}
	return total
}

// synFrame returns a frame with a TCP SYN to the metadata service, with a correct checksum.
func synFrame(source, destination []byte, port uint16) []byte {
	tcp := binary.BigEndian.AppendUint16(nil, port)
	tcp = append(binary.BigEndian.AppendUint16(tcp, 80), 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x02, 0xff, 0xff, 0, 0, 0, 0)
	pseudo := append(netip.MustParseAddr(podIP6).AsSlice(), netip.MustParseAddr(service6).AsSlice()...)
	pseudo = append(pseudo, 0, 0, 0, byte(len(tcp)), 0, 0, 0, unix.IPPROTO_TCP)
	binary.BigEndian.PutUint16(tcp[16:], ^uint16(sum(append(pseudo, tcp...))))
	frame := append(append(append([]byte(nil), destination...), source...), 0x86, 0xdd)
	return append(frame, ipv6(podIP6, service6, unix.IPPROTO_TCP, tcp)...)
}

// offloaded returns a frame, behind a struct virtio_net_hdr, that becomes the given one when the kernel
// completes the checksum that the header asks for: two bytes at the offset have another value until
// then.
func offloaded(frame []byte, offset int) []byte {
	frame = append([]byte(nil), frame...)
	final := binary.BigEndian.Uint16(frame[offset:])
	binary.BigEndian.PutUint16(frame[offset:], 0)
	rest := sum(frame[offset:])
	initial := sum([]byte{byte(^final >> 8), byte(^final), byte(^uint16(rest) >> 8), byte(^uint16(rest))})
	binary.BigEndian.PutUint16(frame[offset:], uint16(initial))
	header := make([]byte, 10)
	header[0] = 1 // VIRTIO_NET_HDR_F_NEEDS_CSUM
	binary.NativeEndian.PutUint16(header[6:], uint16(offset))
	return append(header, frame...)
}

// switchOffloadOff has the kernel write the checksums of frames that leave by an interface, as for a
// network card that cannot (linux/ethtool.h, ETHTOOL_STXCSUM).
func switchOffloadOff(t *testing.T, name string) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	value := struct{ command, data uint32 }{command: 0x17}
	request := struct {
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte
	}{data: unsafe.Pointer(&value)}
	copy(request.name[:], name)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&request))); errno != 0 {
		t.Fatal(errno)
	}
}

// TestChecksumOffloadBringsNoAnswer has a pod with NET_RAW send a packet whose destination becomes the
// metadata service's after all rules, when the kernel writes a checksum over a part of the address. The
// answer does not reach the pod.
func TestChecksumOffloadBringsNoAnswer(t *testing.T) {
	host, outside, pod := netnstest.New(t), netnstest.New(t), netnstest.New(t)
	host.Veth("eth0", outside, "eth0")
	pod.Veth("eth0", host, "pod0")
	outside.IP("link set eth0 up", "addr add fd00:ec2::254/128 dev eth0 nodad", "addr add fd00:7::2/64 dev eth0 nodad", "route add fd00:1::/64 via fd00:7::1")
	host.IP("link set pod0 up", "addr add fd00:7::1/64 dev eth0 nodad", "route add default via fd00:7::2", "addr add fd00:1::1/64 dev pod0 nodad")
	pod.IP("addr add "+podIP6+"/64 dev eth0 nodad", "route add default via fd00:1::1")
	host.Sysctl("net/ipv6/conf/all/forwarding", "1")
	host.Do(func() { switchOffloadOff(t, "eth0") })
	outside.Listen("tcp", "[fd00:ec2::254]:80")
	podLink, err := pod.Handle().LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	hostLink, err := host.Handle().LinkByName("pod0")
	if err != nil {
		t.Fatal(err)
	}
	host.Enter()
	var out int
	pod.Do(func() {
		out = packetSocket(t, 0)
		if err := unix.SetsockoptInt(out, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1); err != nil {
			t.Fatal(err)
		}
	})
	in := capture(t, pod, podLink.Attrs().Index)
	to := unix.SockaddrLinklayer{Ifindex: podLink.Attrs().Index, Protocol: networkOrder(unix.ETH_P_IPV6)}
	send := func(frame []byte) {
		t.Helper()
		if err := unix.Sendto(out, frame, 0, &to); err != nil {
			t.Fatal(err)
		}
	}
	// isAnswered reports whether an answer arrives before that to a later connection, which is refused.
	isAnswered := func(port uint16) bool {
		send(offloaded(synFrame(podLink.Attrs().HardwareAddr, hostLink.Attrs().HardwareAddr, port), 52)) // the address ends at 54
		pod.Do(func() {
			if conn, err := net.Dial("tcp", "[fd00:7::2]:9"); err == nil {
				conn.Close()
				t.Fatal("port 9 is open")
			}
		})
		answered := false
		for buffer := make([]byte, 2048); ; {
			n, err := unix.Read(in, buffer)
			if err != nil {
				t.Fatal(err)
			}
			const tcp, syn, reset, ack = 54, 0x02, 0x04, 0x10
			if n < tcp+20 || buffer[20] != unix.IPPROTO_TCP {
				continue
			}
			from, to, flags := binary.BigEndian.Uint16(buffer[tcp:]), binary.BigEndian.Uint16(buffer[tcp+2:]), buffer[tcp+13]
			switch {
			case from == 9 && flags&reset != 0:
				return answered
			case from == 80 && to == port && flags == syn|ack:
				answered = true
			}
		}
	}
	if !isAnswered(41000) {
		t.Fatal("without a guard there is no answer")
	}
	node := rules.New(rules.Settings{MetadataIP: metadata, IPv6: true, Guard: true}, nil, slog.New(slog.DiscardHandler))
	defer node.Close()
	if _, err := node.MakeGuard(t.Context()); err != nil {
		t.Fatal(err)
	}
	if isAnswered(41001) {
		t.Error("the pod has an answer of the metadata service")
	}
}
