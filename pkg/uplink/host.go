package uplink

import (
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/hostlink"
)

// host is the interfaces, routes and addresses of a network namespace.
type host struct {
	links     []netlink.Link
	routes    []netlink.Route
	addresses []netlink.Addr
}

func readHost() (h host, err error) {
	if h.links, err = hostlink.Dump(netlink.LinkList); err != nil {
		return host{}, fmt.Errorf("interfaces: %w", err)
	}
	h.routes, err = hostlink.Dump(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return host{}, fmt.Errorf("routes: %w", err)
	}
	h.addresses, err = hostlink.Dump(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return host{}, fmt.Errorf("addresses: %w", err)
	}
	return h, nil
}

// uplinkKinds are the kinds of interfaces that are uplinks without a route: a macvlan, an ipvlan or
// a port of a bridge can send frames by them. "device" is one without a virtual kind.
var uplinkKinds = []string{"device", "bond", "team", "vlan"}

// uplinks returns the interfaces over which a packet to one of the services can leave the node:
//   - those of uplinkKinds;
//   - those that a unicast route of any table to a service names, for example the veth of a node
//     that is itself a container.
func (h host) uplinks(services []netip.Addr) []netlink.Link {
	byRoute := make(map[int]bool)
	for _, r := range h.routes {
		if !isRouteTo(r, services) {
			continue
		}
		byRoute[r.LinkIndex] = true
		for _, hop := range r.MultiPath {
			byRoute[hop.LinkIndex] = true
		}
	}
	return slices.DeleteFunc(slices.Clone(h.links), func(l netlink.Link) bool {
		attrs := l.Attrs()
		if attrs.Flags&net.FlagLoopback != 0 {
			return true
		}
		return !slices.Contains(uplinkKinds, l.Type()) && !byRoute[attrs.Index]
	})
}

// isRouteTo reports whether packets to one of the services can take a route.
func isRouteTo(r netlink.Route, services []netip.Addr) bool {
	if r.Type != unix.RTN_UNICAST {
		return false
	}
	return slices.ContainsFunc(services, func(service netip.Addr) bool {
		isIPv6 := r.Family == unix.AF_INET6
		return isIPv6 == service.Is6() && (r.Dst == nil || r.Dst.Contains(service.AsSlice()))
	})
}

// hardwareAddrs returns the Ethernet addresses of the frames that the node sends over a link: its
// own, and those of the interfaces of this namespace above it, as VLANs, a bond, a bridge or a
// macvlan. It returns none for a link without Ethernet headers.
func (h host) hardwareAddrs(link netlink.Link) []net.HardwareAddr {
	if !hasEthernet(link) {
		return nil
	}
	var addrs []net.HardwareAddr
	isSeen := make(map[int]bool)
	for todo := []netlink.Link{link}; len(todo) > 0; todo = todo[1:] {
		attrs := todo[0].Attrs()
		if isSeen[attrs.Index] {
			continue
		}
		isSeen[attrs.Index] = true
		if len(attrs.HardwareAddr) == 6 {
			addrs = append(addrs, attrs.HardwareAddr)
		}
		for _, other := range h.links {
			// The parent's index counts in this namespace only without a NetNsID. A veth's is its peer.
			isChild := other.Attrs().ParentIndex == attrs.Index && other.Attrs().NetNsID < 0 && other.Type() != "veth"
			if isChild || attrs.MasterIndex == other.Attrs().Index {
				todo = append(todo, other)
			}
		}
	}
	return addrs
}

func hasEthernet(link netlink.Link) bool { return link.Attrs().EncapType == "ether" }

// ips returns the node's addresses that can be the source of a packet that leaves it.
func (h host) ips() []netip.Addr {
	var ips []netip.Addr
	for _, a := range h.addresses {
		if ip, ok := netip.AddrFromSlice(a.IP); ok && a.Scope == unix.RT_SCOPE_UNIVERSE {
			ips = append(ips, ip.Unmap())
		}
	}
	return ips
}
