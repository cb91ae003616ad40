package hostlink

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Links are the names of the calling thread's namespace's interfaces, by index. The kernel does not give an index again
// while it has others left, so a name and its index together are one interface.
func Links() (map[int]string, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	defer h.Close()
	list, err := dump(h.LinkList)
	if err != nil {
		return nil, fmt.Errorf("interfaces of the host: %w", err)
	}
	links := make(map[int]string, len(list))
	for _, l := range list {
		links[l.Attrs().Index] = l.Attrs().Name
	}
	return links, nil
}

// Holds tells whether the interface in the namespace at netnsPath holds an address. It is false where there is no such
// interface, or no namespace.
func Holds(netnsPath, ifName string, ip netip.Addr) bool {
	pod, err := netns.GetFromPath(netnsPath)
	if err != nil {
		return false
	}
	defer pod.Close()
	h, err := netlink.NewHandleAt(pod, unix.NETLINK_ROUTE)
	if err != nil {
		return false
	}
	defer h.Close()
	link, err := h.LinkByName(ifName)
	if err != nil {
		return false
	}
	ips, err := addresses(h, link)
	return err == nil && slices.Contains(ips, ip)
}

// HostSide is the name of the host side of an interface in the namespace at netnsPath; empty where Find has none.
func HostSide(netnsPath, ifName string) string {
	link, err := Find(netnsPath, ifName)
	if err != nil {
		return ""
	}
	return link.Name
}
