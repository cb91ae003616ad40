package hostlink

import (
	"errors"
	"fmt"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// BypassCandidates returns which of the given interfaces of the calling thread's namespace have a
// program that can bypass netfilter, as in Link.CanBypass. The keys are the interfaces' indices. It
// lists tc filters only for interfaces with a qdisc that can have them.
func BypassCandidates(links map[int]string) (map[int]bool, error) {
	qdiscs, err := Dump(func() ([]netlink.Qdisc, error) { return netlink.QdiscList(nil) })
	if err != nil {
		return nil, fmt.Errorf("qdiscs of the host: %w", err)
	}
	hasQdisc := make(map[int]bool)
	for _, q := range qdiscs {
		if kind := q.Type(); kind == "clsact" || kind == "ingress" {
			hasQdisc[q.Attrs().LinkIndex] = true
		}
	}
	all, err := Dump(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("interfaces of the host: %w", err)
	}
	canBypass := make(map[int]bool)
	for _, link := range all {
		index := link.Attrs().Index
		if links[index] == "" {
			continue
		}
		canBypass[index] = hasProgram(link)
		if hasQdisc[index] && !canBypass[index] {
			if canBypass[index], err = hasTCFilter(link); err != nil {
				return nil, err
			}
		}
	}
	return canBypass, nil
}

// canBypass reports whether a BPF program or a tc filter sees a link's packets before netfilter.
// Such a program can send packets past netfilter, but most programs do not.
func canBypass(link netlink.Link) (bool, error) {
	if hasProgram(link) {
		return true, nil
	}
	return hasTCFilter(link)
}

// hasProgram reports whether a BPF program is attached to a link by XDP, tcx or netkit.
func hasProgram(link netlink.Link) bool {
	attrs := link.Attrs()
	return attrs.Xdp != nil && attrs.Xdp.Attached || isAttached(attrs.Index, tcxIngress) || isAttached(attrs.Index, netkitPeer)
}

// hasTCFilter reports whether a link has a tc filter at its ingress.
func hasTCFilter(link netlink.Link) (bool, error) {
	// The parents of ingress filters: that of a clsact qdisc and that of an ingress qdisc.
	for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.MakeHandle(0xffff, 0)} {
		filters, err := Dump(func() ([]netlink.Filter, error) { return netlink.FilterList(link, parent) })
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
// 6.7). The programs at BPF_NETKIT_PEER see the packets that the pod's side of a netkit pair sends.
// The kernel answers a query for BPF_NETKIT_PEER only if it names the primary side.
const (
	progQuery  = 16
	tcxIngress = 46
	netkitPeer = 55
)

// progQueryAttr is the variant of union bpf_attr for BPF_PROG_QUERY.
type progQueryAttr struct {
	ifIndex, attachType, queryFlags, attachFlags uint32
	progIDs                                      uint64
	count, _                                     uint32
	progAttachFlags, linkIDs, linkAttachFlags    uint64
	revision                                     uint64
}

// isAttached reports whether a program is attached to a link at this attach point. It returns false
// if the kernel has no such attach point, and true if this process may not query it.
func isAttached(ifIndex int, attachType uint32) bool {
	attr := progQueryAttr{ifIndex: uint32(ifIndex), attachType: attachType}
	_, _, errno := unix.Syscall(unix.SYS_BPF, progQuery, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	return errno == 0 && attr.count > 0 || errno == unix.EPERM || errno == unix.EACCES
}
