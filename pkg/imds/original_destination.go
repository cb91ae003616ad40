package imds

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"
)

// originalDestination returns the destination of a connection before a rule redirected it, as
// conntrack reports it (SO_ORIGINAL_DST and IP6T_SO_ORIGINAL_DST of linux/netfilter_ipv4.h and
// linux/netfilter_ipv6/ip6_tables.h). For other connections it returns the local address.
func originalDestination(c *net.TCPConn) (netip.AddrPort, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return netip.AddrPort{}, err
	}
	local := addrPort(c.LocalAddr())
	read := originalDestination6
	if local.Addr().Is4() {
		read = originalDestination4
	}
	var destination netip.AddrPort
	var sockErr error
	if err := raw.Control(func(fd uintptr) { destination, sockErr = read(int(fd)) }); err != nil {
		return netip.AddrPort{}, err
	}
	if errors.Is(sockErr, unix.ENOENT) || errors.Is(sockErr, unix.ENOPROTOOPT) {
		return local, nil // without conntrack, nothing redirected the connection
	}
	return destination, sockErr
}

// originalDestination4 reads a struct sockaddr_in: family, port and address. x/sys/unix has no call
// of that name, but GetsockoptIPv6Mreq fills a structure that is large enough.
func originalDestination4(fd int) (netip.AddrPort, error) {
	m, err := unix.GetsockoptIPv6Mreq(fd, unix.SOL_IP, unix.SO_ORIGINAL_DST)
	if err != nil {
		return netip.AddrPort{}, err
	}
	b := m.Multiaddr
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), binary.BigEndian.Uint16(b[2:4])), nil
}

// originalDestination6 reads a struct sockaddr_in6, which is the first field of the structure that
// GetsockoptIPv6MTUInfo fills.
func originalDestination6(fd int) (netip.AddrPort, error) {
	info, err := unix.GetsockoptIPv6MTUInfo(fd, unix.SOL_IPV6, unix.SO_ORIGINAL_DST)
	if err != nil {
		return netip.AddrPort{}, err
	}
	var port [2]byte
	binary.NativeEndian.PutUint16(port[:], info.Addr.Port)
	return netip.AddrPortFrom(netip.AddrFrom16(info.Addr.Addr), binary.BigEndian.Uint16(port[:])), nil
}

// addrPort returns a TCP address without the zone, and an IPv4-mapped one as IPv4.
func addrPort(a net.Addr) netip.AddrPort {
	ap := a.(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port())
}
