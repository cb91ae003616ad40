package uplink

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// clsBPF attaches a filter to the clsact qdisc of a link, in direct action mode. The filter needs
// neither a process nor a file. Among the filters of one preference, the kernel runs the newest
// first (cls_bpf_change in net/sched/cls_bpf.c), so the guard shares the first preference with
// other programs, for example Cilium's.
type clsBPF struct{}

// preference is the lowest one: 0 lets the kernel choose. The guard alternates between two handles,
// so its old and its new filter coexist during an exchange.
const preference = 1

var handles = [2]uint32{0x6b32_0001, 0x6b32_0002}

func (clsBPF) attach(l netlink.Link, programs []program) (wasMissing bool, err error) {
	if err := netlink.QdiscAdd(clsact(l)); err != nil && !errors.Is(err, unix.EEXIST) {
		return false, unsupported("clsact qdisc", err)
	}
	filters, err := netlink.FilterList(l, netlink.HANDLE_MIN_EGRESS)
	if err != nil {
		return false, unsupported("filters", err)
	}
	isGuarded := len(filters) > 0 && isGuard(filters[0])
	var former []netlink.Filter
	handle := handles[0]
	for i, f := range filters {
		if !isGuard(f) {
			continue
		}
		if i == 0 && has(programs, ebpf.ProgramID(f.(*netlink.BpfFilter).Id)) {
			return false, nil
		}
		former = append(former, f)
		if f.Attrs().Handle == handle {
			handle = handles[1]
		}
	}
	filter := &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: l.Attrs().Index, Parent: netlink.HANDLE_MIN_EGRESS, Priority: preference, Protocol: unix.ETH_P_ALL, Handle: handle,
		},
		Fd: programs[0].FD(), Name: programName, DirectAction: true,
	}
	// EINVAL: the preference has filters of another kind or protocol, which no filter can precede.
	if err := netlink.FilterReplace(filter); errors.Is(err, unix.EINVAL) {
		return false, fmt.Errorf("%w: another program has filters with preference %d", ErrUnsupported, preference)
	} else if err != nil {
		return false, unsupported(fmt.Sprintf("a filter with preference %d", preference), err)
	}
	for _, f := range former {
		if f.Attrs().Handle != handle {
			err = errors.Join(err, netlink.FilterDel(f))
		}
	}
	return !isGuarded, err
}

func clsact(l netlink.Link) netlink.Qdisc {
	return &netlink.GenericQdisc{QdiscType: "clsact", QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: l.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
	}}
}

func isGuard(f netlink.Filter) bool {
	bpf, isBPF := f.(*netlink.BpfFilter)
	return isBPF && bpf.Name == programName
}

// unsupported says what the kernel could not do. It answers ENOENT or EOPNOTSUPP for a module that
// it lacks.
func unsupported(object string, err error) error {
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("%w: %s: %w", ErrUnsupported, object, err)
	}
	return fmt.Errorf("%s: %w", object, err)
}

// removeClsBPF removes the filters, and each clsact qdisc that has no other.
func removeClsBPF() error {
	links, err := netlink.LinkList()
	errs := []error{err}
	for _, l := range links {
		filters, err := netlink.FilterList(l, netlink.HANDLE_MIN_EGRESS)
		if err != nil {
			continue // without a clsact qdisc
		}
		removed := 0
		for _, f := range filters {
			if isGuard(f) {
				errs = append(errs, netlink.FilterDel(f))
				removed++
			}
		}
		ingress, _ := netlink.FilterList(l, netlink.HANDLE_MIN_INGRESS)
		if removed > 0 && removed == len(filters) && len(ingress) == 0 {
			errs = append(errs, netlink.QdiscDel(clsact(l)))
		}
	}
	return errors.Join(errs...)
}
