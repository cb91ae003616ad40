package node

import (
	"errors"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// conntrackTurns is how often the table is read that others change meanwhile, of which the kernel may not show all then.
const conntrackTurns = 10

// CutDirect ends the tracked connections from pods to a service that go to the service itself, and tells how many there
// were: a new redirection is for new connections only, and one that is tracked keeps its way. The host's own, which have a
// local source, go on. A kernel without connection tracking has none.
func CutDirect(service netip.AddrPort) (int, error) {
	family := netlink.InetFamily(unix.AF_INET)
	if service.Addr().Is6() {
		family = unix.AF_INET6
	}
	local, err := net.InterfaceAddrs()
	if err != nil {
		return 0, err
	}
	var n uint
	for range conntrackTurns {
		var some uint
		some, err = netlink.ConntrackDeleteFilters(netlink.ConntrackTable, family, &direct{service, local})
		n += some
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	for _, harmless := range []error{unix.EOPNOTSUPP, unix.EPROTONOSUPPORT, unix.ENOENT} { // the last one ended by itself
		if errors.Is(err, harmless) {
			return int(n), nil
		}
	}
	return int(n), err
}

// direct matches connections to a service that answers itself.
type direct struct {
	service netip.AddrPort
	local   []net.Addr
}

// MatchConntrackFlow implements netlink.CustomConntrackFilter.
func (d *direct) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool {
	to, answers := flow.Forward, flow.Reverse
	if to.Protocol != unix.IPPROTO_TCP || to.DstPort != d.service.Port() {
		return false
	}
	if addr(to.DstIP) != d.service.Addr() || addr(answers.SrcIP) != d.service.Addr() {
		return false
	}
	return !slices.ContainsFunc(d.local, func(a net.Addr) bool {
		own, ok := a.(*net.IPNet)
		return ok && own.IP.Equal(to.SrcIP)
	})
}

func addr(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}
