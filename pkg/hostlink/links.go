package hostlink

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"

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

// Addresses are those that an interface in the namespace at netnsPath holds, as Link.IPs are. Where there is no such interface,
// no namespace, or the path leads to the host's own, there are none; an error says that this could not be found out.
func Addresses(netnsPath, ifName string) ([]netip.Addr, error) {
	pod, err := netns.GetFromPath(netnsPath)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("network namespace %s: %w", netnsPath, err)
	}
	defer pod.Close()
	if own, err := isHost(pod); own || err != nil {
		return nil, err // of a process of the host's that has the PID of a pod's
	}
	var of unix.Statfs_t
	if err := unix.Fstatfs(int(pod), &of); err != nil {
		return nil, fmt.Errorf("network namespace %s: %w", netnsPath, err)
	}
	if of.Type != unix.NSFS_MAGIC {
		return nil, nil // the file that a namespace was mounted on, once
	}
	h, err := netlink.NewHandleAt(pod, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("network namespace %s: %w", netnsPath, err)
	}
	defer h.Close()
	link, err := h.LinkByName(ifName)
	if _, none := errors.AsType[netlink.LinkNotFoundError](err); none {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("interface %s of %s: %w", ifName, netnsPath, err)
	}
	return addresses(pod, link.Attrs().Index)
}

// HostSide is the name of the host side of an interface in the namespace at netnsPath; empty where Find has none.
func HostSide(netnsPath, ifName string) string {
	link, err := Find(netnsPath, ifName)
	if unsupported, ok := errors.AsType[*UnsupportedError](err); ok {
		return unsupported.HostLink
	}
	if err != nil {
		return ""
	}
	return link.Name
}
