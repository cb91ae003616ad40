// Package uplink guards the interfaces over which packets leave the node. A BPF program at the
// egress of each drops requests to the metadata service that the node itself did not send. Unlike
// the rules of netfilter it sees what BPF programs forward past netfilter, raw frames, and the
// packets of macvlan and ipvlan interfaces. A pod cannot remove it.
// docs/decisions/0017-guard-at-the-uplinks.md has its limits.
package uplink

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/rlimit"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
)

// programName is the program's name in the kernel, and that of its cls_bpf filters.
const programName = "kube2iam_uplink"

// ErrUnsupported is the error of a kernel that cannot run the guard.
var ErrUnsupported = errors.New("the kernel cannot guard the uplinks")

// Guard is the guard of a network namespace: that of the thread that calls its methods. It is not
// safe for concurrent use.
type Guard struct {
	services []netip.Addr
	objects  objects
	programs []program
	hook     hook
	// removeOther removes what an earlier agent attached by the other hook, whose maps no process
	// updates. It is nil after its call.
	removeOther func() error

	// What the maps hold.
	links     map[uint32]uint32
	senders   map[senderKey]uint32
	addresses map[[16]byte]uint32
}

// hook attaches a program to the egress of an interface, ahead of all others. What it attaches
// stays when the process ends.
type hook interface {
	// attach makes one of the programs the first at the link's egress, in place of one of an earlier
	// process. One of the two is attached at every moment. It reports whether none was the first before.
	attach(link netlink.Link, programs []program) (wasMissing bool, err error)
}

// New loads the program. metadata is the IPv4 address of the metadata service; the IPv6 address is
// fixed. dir is a directory of a BPF file system, in which the attachments by tcx are pinned; it
// need not exist. A kernel before 6.6, or a node without such a file system, has cls_bpf filters
// instead. The error is ErrUnsupported if the kernel lacks BPF.
func New(metadata netip.Addr, dir string) (*Guard, error) {
	// A kernel before 5.11 counts BPF memory by the rlimit. An error shows when the program is loaded.
	_ = rlimit.RemoveMemlock()
	g := &Guard{
		services: []netip.Addr{metadata, attachment.MetadataIPv6},
		links:    make(map[uint32]uint32), senders: make(map[senderKey]uint32), addresses: make(map[[16]byte]uint32),
	}
	err := newCollection(metadata).LoadAndAssign(&g.objects, nil)
	// EPERM: the memory exceeds the rlimit, or a security module refuses BPF.
	if errors.Is(err, ebpf.ErrNotSupported) || errors.Is(err, unix.EPERM) {
		err = fmt.Errorf("%w: %w", ErrUnsupported, err)
	}
	if err != nil {
		return nil, fmt.Errorf("uplink guard: %w", err)
	}
	if g.programs, err = g.objects.programs(); err != nil {
		return nil, errors.Join(err, g.Close())
	}
	g.hook, g.removeOther = newTCX(dir), removeClsBPF
	if g.hook == nil {
		g.hook, g.removeOther = clsBPF{}, func() error { return removeTCX(dir) }
	}
	return g, nil
}

// Close releases the program and its maps. What is attached stays.
func (g *Guard) Close() error {
	o := g.objects
	return errors.Join(o.Program.Close(), o.Copy.Close(), o.Links.Close(), o.Senders.Close(), o.Addresses.Close())
}

// Reconcile guards all uplinks, and makes the program know the node's interfaces and addresses. It
// returns the names of the uplinks that were not guarded before. The error joins those of single
// uplinks.
func (g *Guard) Reconcile() (unguarded []string, err error) {
	h, err := readHost()
	if err != nil {
		return nil, err
	}
	uplinks := h.uplinks(g.services)
	var errs []error
	if err := g.fillMaps(h, uplinks); err != nil { // packets of the node may be dropped; pods' are
		errs = append(errs, fmt.Errorf("maps of the uplink guard: %w", err))
	}
	for _, l := range uplinks {
		wasMissing, err := g.hook.attach(l, g.programs)
		if err != nil {
			errs = append(errs, fmt.Errorf("uplink %s: %w", l.Attrs().Name, err))
		}
		if wasMissing {
			unguarded = append(unguarded, l.Attrs().Name)
		}
	}
	if len(errs) == 0 && g.removeOther != nil {
		errs = append(errs, g.removeOther())
		g.removeOther = nil
	}
	return unguarded, errors.Join(errs...)
}

func (g *Guard) fillMaps(h host, uplinks []netlink.Link) error {
	links, senders, addresses := make(map[uint32]uint32), make(map[senderKey]uint32), make(map[[16]byte]uint32)
	for _, l := range uplinks {
		index := uint32(l.Attrs().Index)
		links[index] = 0
		if hasEthernet(l) {
			links[index] = 1
		}
		for _, addr := range h.hardwareAddrs(l) {
			senders[senderKey{IfIndex: index, HardwareAddr: [6]byte(addr)}] = 1
		}
	}
	for _, ip := range h.ips() {
		addresses[ip.As16()] = 1
	}
	return errors.Join(
		updateMap(g.objects.Links, g.links, links),
		updateMap(g.objects.Senders, g.senders, senders),
		updateMap(g.objects.Addresses, g.addresses, addresses))
}

// updateMap makes a map of the kernel hold what is wanted. held is what it holds.
func updateMap[K comparable](m *ebpf.Map, held, wanted map[K]uint32) error {
	for key := range held {
		if _, isWanted := wanted[key]; isWanted {
			continue
		}
		if err := m.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return err
		}
		delete(held, key)
	}
	for key, value := range wanted {
		if before, isHeld := held[key]; isHeld && before == value {
			continue
		}
		if err := m.Put(key, value); err != nil {
			return err
		}
		held[key] = value
	}
	return nil
}

// Remove removes the guard from all interfaces, and its pins in dir.
func Remove(dir string) error {
	return errors.Join(removeTCX(dir), removeClsBPF())
}
