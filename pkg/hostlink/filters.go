package hostlink

import (
	"errors"
	"fmt"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// filtered tells whether anything sees a link's packets before netfilter does, and so may take them past it: a tc filter at
// its ingress (a BPF program, or one that redirects), or a BPF program attached by tcx, XDP or netkit. What it does with them is not
// told: most of them do no such thing.
func filtered(h *netlink.Handle, link netlink.Link) (bool, error) {
	if xdp(link) || programs(link.Attrs().Index) {
		return true, nil
	}
	return tcFiltered(h, link)
}

func xdp(link netlink.Link) bool {
	x := link.Attrs().Xdp
	return x != nil && x.Attached
}

func tcFiltered(h *netlink.Handle, link netlink.Link) (bool, error) {
	for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.MakeHandle(0xffff, 0)} { // of clsact, and of ingress
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

// What is asked of bpf(2) is how many programs are attached to a link's ingress (linux/bpf.h, BPF_PROG_QUERY,
// BPF_TCX_INGRESS; Linux 6.6), and to a netkit pair for what the pod's side sends (BPF_NETKIT_PEER; Linux 6.7). The kernel
// takes the second question of the primary side only, and has no answer of another link.
const (
	progQuery  = 16
	tcxIngress = 46
	netkitPeer = 55
)

// progQueryAttr is the query's part of union bpf_attr.
type progQueryAttr struct {
	ifIndex, attachType, queryFlags, attachFlags uint32
	progIDs                                      uint64
	count, _                                     uint32
	progAttachFlags, linkIDs, linkAttachFlags    uint64
	revision                                     uint64
}

// programs tells whether a program of tcx or netkit sees what enters by a link.
func programs(ifIndex int) bool {
	return attached(ifIndex, tcxIngress) || attached(ifIndex, netkitPeer)
}

// attached is false on a kernel that has no such thing. Who may not ask has to take it that there may be one.
func attached(ifIndex int, attachType uint32) bool {
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

// Filtered are those of the calling thread's namespace's interfaces whose packets something sees before netfilter does, by
// index. It asks for the few that may have a filter, and not for each.
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
	may := make(map[int]bool)
	for _, q := range qdiscs {
		if kind := q.Type(); kind == "clsact" || kind == "ingress" {
			may[q.Attrs().LinkIndex] = true
		}
	}
	all, err := dump(h.LinkList)
	if err != nil {
		return nil, fmt.Errorf("interfaces of the host: %w", err)
	}
	found := make(map[int]bool)
	for _, link := range all {
		if index := link.Attrs().Index; links[index] != "" && xdp(link) {
			found[index] = true
		}
	}
	for index, name := range links {
		if !found[index] && programs(index) {
			found[index] = true
		}
		if !may[index] || found[index] {
			continue
		}
		link := &netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: index, Name: name}}
		if found[index], err = tcFiltered(h, link); err != nil {
			return nil, err
		}
	}
	return found, nil
}
