package hostlink

import (
	"errors"
	"fmt"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// isFiltered reports whether a filter sees a link's packets before netfilter, and so can bypass it:
// a tc filter at its ingress, or a BPF program attached by tcx, XDP or netkit. Most filters bypass
// nothing.
func isFiltered(h *netlink.Handle, link netlink.Link) (bool, error) {
	if hasXDP(link) || hasPrograms(link.Attrs().Index) {
		return true, nil
	}
	return hasTCFilter(h, link)
}

func hasXDP(link netlink.Link) bool {
	xdp := link.Attrs().Xdp
	return xdp != nil && xdp.Attached
}

func hasTCFilter(h *netlink.Handle, link netlink.Link) (bool, error) {
	for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.MakeHandle(0xffff, 0)} { // clsact and ingress
		filters, err := dump(func() ([]netlink.Filter, error) { return h.FilterList(link, parent) })
		if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EOPNOTSUPP) {
			return false, fmt.Errorf("tc filters of %s: %w", link.Attrs().Name, err)
		}
		if len(filters) > 0 {
			return true, nil
		}
	}
	return false, nil
}

// Names of linux/bpf.h: BPF_PROG_QUERY, BPF_TCX_INGRESS (Linux 6.6) and BPF_NETKIT_PEER (Linux
// 6.7), which is the attach point for what the pod's side of a netkit pair sends. The kernel
// answers a query for the latter only for the primary side.
const (
	progQuery  = 16
	tcxIngress = 46
	netkitPeer = 55
)

// progQueryAttr is the part of union bpf_attr for BPF_PROG_QUERY.
type progQueryAttr struct {
	ifIndex, attachType, queryFlags, attachFlags uint32
	progIDs                                      uint64
	count, _                                     uint32
	progAttachFlags, linkIDs, linkAttachFlags    uint64
	revision                                     uint64
}

// hasPrograms reports whether a tcx or netkit program sees what enters by a link.
func hasPrograms(ifIndex int) bool {
	return isAttached(ifIndex, tcxIngress) || isAttached(ifIndex, netkitPeer)
}

// isAttached returns false on a kernel without the attach point, and true if this process may not
// query it.
func isAttached(ifIndex int, attachType uint32) bool {
	attr := progQueryAttr{ifIndex: uint32(ifIndex), attachType: attachType}
	_, _, errno := unix.Syscall(unix.SYS_BPF, progQuery, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	switch errno {
	case 0:
		return attr.count > 0
	case unix.EPERM, unix.EACCES:
		return true
	}
	return false
}

// Filtered returns which of the given interfaces of the calling thread's namespace have a filter
// that sees their packets before netfilter, by index. It lists tc filters only of interfaces with a
// qdisc that can have them.
func Filtered(links map[int]string) (map[int]bool, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	defer h.Close()
	qdiscs, err := dump(func() ([]netlink.Qdisc, error) { return h.QdiscList(nil) })
	if err != nil {
		return nil, fmt.Errorf("qdiscs of the host: %w", err)
	}
	hasQdisc := make(map[int]bool)
	for _, q := range qdiscs {
		if kind := q.Type(); kind == "clsact" || kind == "ingress" {
			hasQdisc[q.Attrs().LinkIndex] = true
		}
	}
	all, err := dump(h.LinkList)
	if err != nil {
		return nil, fmt.Errorf("interfaces of the host: %w", err)
	}
	filtered := make(map[int]bool)
	for _, link := range all {
		if index := link.Attrs().Index; links[index] != "" && hasXDP(link) {
			filtered[index] = true
		}
	}
	for index, name := range links {
		if !filtered[index] && hasPrograms(index) {
			filtered[index] = true
		}
		if !hasQdisc[index] || filtered[index] {
			continue
		}
		link := &netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: index, Name: name}}
		if filtered[index], err = hasTCFilter(h, link); err != nil {
			return nil, err
		}
	}
	return filtered, nil
}
