package hostlink

import (
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Family is an IP version.
type Family int

const (
	IPv4 Family = 4
	IPv6 Family = 6
)

// outside are addresses that no network has (RFC 5737, RFC 3849), so the route towards one is the default route. Nothing
// is sent there.
var outside = map[Family]netip.Addr{
	IPv4: netip.MustParseAddr("192.0.2.1"),
	IPv6: netip.MustParseAddr("2001:db8::1"),
}

// NodeIP is the node's own address towards its default route, as the kernel would choose it for a new connection. An error
// means that the node has no such route, or no address of the family that pods could dial.
func NodeIP(family Family) (netip.Addr, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return netip.Addr{}, err
	}
	defer h.Close()
	to := outside[family]
	routes, err := h.RouteGet(to.AsSlice())
	if err != nil {
		return netip.Addr{}, fmt.Errorf("default IPv%d route: %w", family, err)
	}
	for _, r := range routes {
		ip, ok := netip.AddrFromSlice(r.Src)
		if ip = ip.Unmap(); ok && ip.IsGlobalUnicast() {
			return ip, nil
		}
	}
	return netip.Addr{}, fmt.Errorf("default IPv%d route: no source address that pods can dial", family)
}
