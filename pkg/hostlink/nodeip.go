package hostlink

import (
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/ipfamily"
)

// documentationIPs are addresses that no network has (RFC 5737, RFC 3849), so the route to one is
// the default route. No packet is sent.
var documentationIPs = map[ipfamily.Family]netip.Addr{
	ipfamily.IPv4: netip.MustParseAddr("192.0.2.1"),
	ipfamily.IPv6: netip.MustParseAddr("2001:db8::1"),
}

// NodeIP returns the source address that the kernel selects for connections on the default route.
// An error means that there is no such route, or no address of the family that pods can dial.
func NodeIP(family ipfamily.Family) (netip.Addr, error) {
	routes, err := netlink.RouteGet(documentationIPs[family].AsSlice())
	if err != nil {
		return netip.Addr{}, fmt.Errorf("default %s route: %w", family, err)
	}
	for _, r := range routes {
		ip, ok := netip.AddrFromSlice(r.Src)
		if ip = ip.Unmap(); ok && ip.IsGlobalUnicast() {
			return ip, nil
		}
	}
	return netip.Addr{}, fmt.Errorf("default %s route: no source address that pods can dial", family)
}
