package hostlink

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/podnetns"
)

// Links returns the names of the interfaces in the calling thread's namespace, by index. The kernel
// does not reuse an index while others are free, so a name and an index together identify an
// interface.
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

// Addresses returns the addresses of an interface in the namespace at netnsPath, as in Link.IPs. It
// returns none if there is no such interface or namespace, or if the path leads to the host's
// namespace. An error means that the addresses are unknown.
func Addresses(netnsPath, ifName string) ([]netip.Addr, error) {
	pod, err := podnetns.Open(netnsPath)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, podnetns.ErrHost) {
		return nil, nil // /proc/PID/ns/net can lead to the host's namespace when the PID is reused
	}
	if err != nil {
		return nil, err
	}
	defer pod.Close()
	var statfs unix.Statfs_t
	if err := unix.Fstatfs(int(pod), &statfs); err != nil {
		return nil, fmt.Errorf("network namespace %s: %w", netnsPath, err)
	}
	if statfs.Type != unix.NSFS_MAGIC {
		return nil, nil // the file that a namespace was mounted on
	}
	h, err := netlink.NewHandleAt(pod, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("network namespace %s: %w", netnsPath, err)
	}
	defer h.Close()
	link, err := h.LinkByName(ifName)
	if isNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("interface %s of %s: %w", ifName, netnsPath, err)
	}
	return addresses(pod, link.Attrs().Index)
}

// HostSide returns the name of the host side of an interface in the namespace at netnsPath, or ""
// if it has none.
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
