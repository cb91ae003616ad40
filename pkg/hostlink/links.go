package hostlink

import (
	"fmt"

	"github.com/vishvananda/netlink"
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
	list, err := h.LinkList()
	if err != nil {
		return nil, fmt.Errorf("interfaces of the host: %w", err)
	}
	links := make(map[int]string, len(list))
	for _, l := range list {
		links[l.Attrs().Index] = l.Attrs().Name
	}
	return links, nil
}
