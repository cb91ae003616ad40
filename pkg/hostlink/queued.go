package hostlink

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// DropQueued drops the packets that the host has queued for ip while it resolves the link-layer
// address by ARP or NDP. Otherwise the kernel would send them to the first interface that answers
// for ip within three seconds, even if their socket is closed. If the address is already resolved,
// or is permanent, no packet is queued and DropQueued does nothing. It also does nothing on Linux
// before 5.0, which cannot report a single neighbour.
func DropQueued(ip netip.Addr) error {
	routes, err := netlink.RouteGet(ip.AsSlice())
	if err != nil || len(routes) == 0 || routes[0].Gw != nil {
		return nil // without a route, or through a gateway, no packet is queued for ip itself
	}
	link, family := routes[0].LinkIndex, unix.AF_INET
	if ip.Is6() {
		family = unix.AF_INET6
	}
	// RTM_GETNEIGH of one entry (net/core/neighbour.c, neigh_get).
	request := nl.NewNetlinkRequest(unix.RTM_GETNEIGH, 0)
	request.AddData(&netlink.Ndmsg{Family: uint8(family), Index: uint32(link)})
	request.AddData(nl.NewRtAttr(netlink.NDA_DST, ip.AsSlice()))
	messages, err := request.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWNEIGH)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("neighbour %s: %w", ip, err)
	}
	for _, message := range messages {
		entry, err := netlink.NeighDeserialize(message)
		if err != nil {
			return fmt.Errorf("neighbour %s: %w", ip, err)
		}
		if entry.State&netlink.NUD_INCOMPLETE == 0 {
			continue
		}
		err = netlink.NeighDel(&netlink.Neigh{LinkIndex: link, Family: family, IP: ip.AsSlice()})
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("neighbour %s: %w", ip, err)
		}
	}
	return nil
}
