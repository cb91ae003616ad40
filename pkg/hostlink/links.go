package hostlink

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"

	"github.com/vishvananda/netlink"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/podnetns"
)

// Links returns the names of the interfaces in the calling thread's namespace, by index. The kernel
// does not reuse an index while others are free, so a name and an index together identify an
// interface.
func Links() (map[int]string, error) {
	list, err := Dump(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("interfaces of the host: %w", err)
	}
	links := make(map[int]string, len(list))
	for _, l := range list {
		links[l.Attrs().Index] = l.Attrs().Name
	}
	return links, nil
}

// Addresses returns the addresses of an interface in the namespace at netnsPath, as in Link.IPs. If
// there is no such interface or namespace, or if the path leads to the host's namespace, it returns
// no addresses and no error. An error means that the addresses are unknown.
func Addresses(netnsPath, ifName string) ([]netip.Addr, error) {
	pod, _, ips, err := openInterface(netnsPath, ifName)
	switch {
	case err == nil:
		pod.Close()
	case errors.Is(err, ErrNoInterface), errors.Is(err, fs.ErrNotExist), errors.Is(err, podnetns.ErrNone),
		errors.Is(err, podnetns.ErrHost): // /proc/PID/ns/net, if the host reused the PID
		return nil, nil
	}
	return ips, err
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
