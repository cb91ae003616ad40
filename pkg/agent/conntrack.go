package agent

import (
	"errors"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// conntrackAttempts bounds how often the table is read: the kernel may not show all of a table that
// changes during the dump.
const conntrackAttempts = 10

// cutConnections ends the tracked connections from pods to a service that are not redirected: their
// answers come from the service itself. It returns how many there were. A new redirection applies
// to new connections only. Connections with a local source, the host's own, stay. A kernel without
// connection tracking has none.
func cutConnections(service netip.AddrPort) (int, error) {
	family := netlink.InetFamily(unix.AF_INET)
	if service.Addr().Is6() {
		family = unix.AF_INET6
	}
	local, err := net.InterfaceAddrs()
	if err != nil {
		return 0, err
	}
	var total uint
	for range conntrackAttempts {
		var n uint
		n, err = netlink.ConntrackDeleteFilters(netlink.ConntrackTable, family, &unredirected{service, local})
		total += n
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	// ENOENT: a connection has just ended.
	for _, harmless := range []error{unix.EOPNOTSUPP, unix.EPROTONOSUPPORT, unix.ENOENT} {
		if errors.Is(err, harmless) {
			err = nil
		}
	}
	return int(total), err
}

// unredirected matches forwarded connections whose answers come from the service itself.
type unredirected struct {
	service netip.AddrPort
	local   []net.Addr
}

// MatchConntrackFlow implements netlink.CustomConntrackFilter.
func (u *unredirected) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool {
	request, reply := flow.Forward, flow.Reverse
	if request.Protocol != unix.IPPROTO_TCP || request.DstPort != u.service.Port() {
		return false
	}
	if toAddr(request.DstIP) != u.service.Addr() || toAddr(reply.SrcIP) != u.service.Addr() {
		return false
	}
	return !slices.ContainsFunc(u.local, func(a net.Addr) bool {
		ipNet, ok := a.(*net.IPNet)
		return ok && ipNet.IP.Equal(request.SrcIP)
	})
}

func toAddr(ip net.IP) netip.Addr {
	addr, _ := netip.AddrFromSlice(ip)
	return addr.Unmap()
}
