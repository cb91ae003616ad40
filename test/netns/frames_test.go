package netns

import (
	"bytes"
	"encoding/binary"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/test/netnstest"
	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

// wire is a pod's eth0 as a pod with NET_RAW uses it: it records every frame that arrives and
// sends frames.
type wire struct {
	n     *node
	fd    int
	index int
	mac   net.HardwareAddr

	mu   sync.Mutex
	seen [][]byte
	done chan struct{}
}

// tap opens the pod's interface until the test ends.
func (n *node) tap(s *testbed.Sandbox) *wire {
	n.t.Helper()
	return n.tapAt(s.Netns)
}

// tapAt opens the eth0 of a namespace until the test ends.
func (n *node) tapAt(ns *netnstest.Namespace) *wire {
	n.t.Helper()
	w := &wire{n: n, done: make(chan struct{})}
	n.must(ns.Do(func() error {
		eth0, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		w.index, w.mac = eth0.Index, eth0.HardwareAddr
		w.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(htons(unix.ETH_P_ALL)))
		if err != nil {
			return err
		}
		wait := unix.NsecToTimeval(int64(50 * time.Millisecond))
		if err := unix.SetsockoptTimeval(w.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait); err != nil {
			return err
		}
		return unix.Bind(w.fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: w.index})
	}))
	read := make(chan struct{})
	go func() {
		defer close(read)
		buffer := make([]byte, 64<<10)
		for {
			size, from, err := unix.Recvfrom(w.fd, buffer, 0)
			select {
			case <-w.done:
				return
			default:
			}
			if ll, ok := from.(*unix.SockaddrLinklayer); err == nil && ok && ll.Pkttype != unix.PACKET_OUTGOING {
				w.mu.Lock()
				w.seen = append(w.seen, bytes.Clone(buffer[:size]))
				w.mu.Unlock()
			}
		}
	}()
	n.t.Cleanup(func() {
		close(w.done)
		<-read
		unix.Close(w.fd)
	})
	return w
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

var broadcast = net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// claim tells a machine, or all by the broadcast address, by ARP or NDP that an address has a
// MAC address.
func (w *wire) claim(ip netip.Addr, at, to net.HardwareAddr, toIP netip.Addr) {
	w.n.t.Helper()
	if ip.Is6() {
		w.advertise(ip, at, to, toIP)
		return
	}
	frame := join(to, w.mac, []byte{0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 2}, at, ip.AsSlice(), to, toIP.AsSlice())
	w.send(frame)
}

// introduce sends an ARP request for a pod's address in another's name. The receiver adds an
// entry for the sender if it has none.
func (w *wire) introduce(ip netip.Addr, at net.HardwareAddr, toIP netip.Addr) {
	w.n.t.Helper()
	w.send(join(broadcast, w.mac, []byte{0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 1}, at, ip.AsSlice(), make([]byte, 6), toIP.AsSlice()))
}

// advertise sends an unsolicited neighbour advertisement that overrides (RFC 4861, 4.4).
func (w *wire) advertise(ip netip.Addr, at, to net.HardwareAddr, toIP netip.Addr) {
	w.n.t.Helper()
	if toIP == ip {
		toIP = netip.IPv6LinkLocalAllNodes()
	}
	const override = 0x20
	icmp := join([]byte{136, 0, 0, 0, override, 0, 0, 0}, ip.AsSlice(), []byte{2, 1}, at)
	// The checksum is over addresses, length and protocol, too (RFC 8200, 8.1).
	var sum uint32
	for pair := range slices.Chunk(join(ip.AsSlice(), toIP.AsSlice(), []byte{0, byte(len(icmp)), 0, unix.IPPROTO_ICMPV6}, icmp), 2) {
		sum += uint32(binary.BigEndian.Uint16(pair))
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	binary.BigEndian.PutUint16(icmp[2:], ^uint16(sum))
	body := packet(ip, toIP, unix.IPPROTO_ICMPV6, icmp)
	body[7] = 255 // the hop limit, which says that no router has passed it on
	w.send(join(to, w.mac, []byte{0x86, 0xdd}, body))
}

func join(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

func (w *wire) send(frame []byte) {
	w.n.t.Helper()
	w.n.must(unix.Sendto(w.fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: w.index, Halen: 6}))
}

// from sends from a MAC address, so the bridge learns it at this port.
func (w *wire) from(mac net.HardwareAddr) {
	w.send(join(broadcast, mac, []byte{0x88, 0xb5}, make([]byte, 46))) // an experimental ethertype
}

// payloads returns the TCP bytes of frames between two addresses, in either direction, that this
// pod should not have received.
func (w *wire) payloads(source, destination netip.Addr) (data []byte, segments int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, f := range w.seen {
		src, dst, tcp := tcpOf(f)
		if src != source || dst != destination || len(tcp) < 20 {
			continue
		}
		if tcp[13]&0x04 == 0 { // a reset says nothing
			segments++
		}
		data = append(data, tcp[int(tcp[12]>>4)*4:]...)
	}
	return data, segments
}

// tcpOf returns the TCP segment in a frame and its addresses.
func tcpOf(frame []byte) (src, dst netip.Addr, tcp []byte) {
	if len(frame) < 54 {
		return src, dst, nil
	}
	ip := frame[14:]
	switch kind := binary.BigEndian.Uint16(frame[12:]); {
	case kind == unix.ETH_P_IP && ip[9] == unix.IPPROTO_TCP:
		header, total := int(ip[0]&0xf)*4, min(int(binary.BigEndian.Uint16(ip[2:])), len(ip))
		if header > total {
			return src, dst, nil
		}
		src, _ = netip.AddrFromSlice(ip[12:16])
		dst, _ = netip.AddrFromSlice(ip[16:20])
		return src, dst, ip[header:total]
	case kind == unix.ETH_P_IPV6 && ip[6] == unix.IPPROTO_TCP:
		src, _ = netip.AddrFromSlice(ip[8:24])
		dst, _ = netip.AddrFromSlice(ip[24:40])
		return src, dst, ip[40:min(40+int(binary.BigEndian.Uint16(ip[4:])), len(ip))]
	}
	return src, dst, nil
}
