// Package hostlink finds the host side of a pod's interface and says how the pod's packets enter
// the host.
package hostlink

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/podnetns"
)

// Link is the host side of a pod's veth or netkit pair.
type Link struct {
	Name  string
	Index int
	// Bridge is the bridge that the host side is a port of. Without one, the pod's packets enter
	// the host's IP layer by the link itself.
	Bridge string
	// BridgeNF says whether iptables sees the bridge's packets.
	BridgeNF BridgeNF
	// IsFiltered says that a filter sees the link's packets before netfilter and can bypass it.
	IsFiltered bool
	// IPs are the addresses of the pod's side that other machines can dial, in the kernel's order.
	IPs []netip.Addr
}

// ErrNetns is the error of a network namespace that does not exist or is the host's own.
var ErrNetns = errors.New("network namespace")

// ErrNoInterface is the error of an interface that the namespace does not have.
var ErrNoInterface = errors.New("no such interface")

// UnsupportedError is the error of an interface whose packets cannot be matched on the host.
type UnsupportedError struct {
	IfName string
	Reason string
	// Kind is the kernel's name for the kind of interface: "macvlan", "ipvlan", "veth"; "device" is
	// a physical one.
	Kind string
	// IPs are the interface's addresses, as in Link.
	IPs []netip.Addr
	// HostLink and HostIndex are the host side of a veth that has a master other than a bridge.
	HostLink  string
	HostIndex int
}

const kindLoopback = "loopback"

// IsLoopback reports whether the interface is a loopback.
func (e *UnsupportedError) IsLoopback() bool { return e.Kind == kindLoopback }

func (e *UnsupportedError) Error() string { return fmt.Sprintf("interface %s: %s", e.IfName, e.Reason) }

// Find returns the host side of ifName in the namespace at netnsPath. The host's namespace is that
// of the calling thread.
//
// It asks the kernel only. The host interface that a CNI plugin reports is unreliable: azure-vnet
// reports the node's uplink, aws-cni one that does not exist, weave none. A parent index alone
// proves nothing: a macvlan has one, too, that of the uplink. So both sides must be veths, or both
// of a netkit, and refer to each other by index and by the namespace of that index.
func Find(netnsPath, ifName string) (*Link, error) {
	pod, err := podnetns.Open(netnsPath)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNetns, err)
	}
	defer pod.Close()
	podLinks, err := netlink.NewHandleAt(pod, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("%w %q: %w", ErrNetns, netnsPath, err)
	}
	defer podLinks.Close()
	hostLinks, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	defer hostLinks.Close()

	podSide, err := podLinks.LinkByName(ifName)
	if isNotFound(err) {
		return nil, fmt.Errorf("%w: %s in %s", ErrNoInterface, ifName, netnsPath)
	}
	if err != nil {
		return nil, fmt.Errorf("interface %s in %s: %w", ifName, netnsPath, err)
	}
	ips, err := addresses(pod, podSide.Attrs().Index)
	if err != nil {
		return nil, fmt.Errorf("addresses of %s in %s: %w", ifName, netnsPath, err)
	}
	link, err := findHostSide(hostLinks, pod, podSide)
	if unsupported, ok := errors.AsType[*UnsupportedError](err); ok {
		unsupported.IPs = ips
	}
	if err != nil {
		return nil, err
	}
	link.IPs = ips
	return link, nil
}

func findHostSide(host *netlink.Handle, pod netns.NsHandle, podSide netlink.Link) (*Link, error) {
	hostSide, err := findPeer(host, pod, podSide)
	if err != nil {
		return nil, err
	}
	link := &Link{Name: hostSide.Attrs().Name, Index: hostSide.Attrs().Index}
	if link.IsFiltered, err = isFiltered(host, hostSide); err != nil {
		return nil, err
	}
	if index := hostSide.Attrs().MasterIndex; index != 0 {
		master, err := host.LinkByIndex(index)
		if err != nil {
			return nil, fmt.Errorf("master of %s: %w", link.Name, err)
		}
		if err := link.setMaster(master, podSide); err != nil {
			return nil, err
		}
	}
	return link, nil
}

func newUnsupportedError(podSide netlink.Link, reason string) *UnsupportedError {
	kind := podSide.Type()
	if podSide.Attrs().Flags&net.FlagLoopback != 0 {
		kind = kindLoopback
	}
	return &UnsupportedError{IfName: podSide.Attrs().Name, Reason: reason, Kind: kind}
}

// findPeer returns the other side of the pod's veth or netkit pair. A netkit device delivers what
// one side sends to the other side's receive path, where the host's rules see it, unless a BPF
// program on the pair redirects it. The primary side manages these programs, so it must be the
// host's (drivers/net/netkit.c).
func findPeer(host *netlink.Handle, pod netns.NsHandle, podSide netlink.Link) (netlink.Link, error) {
	name := podSide.Attrs().Name
	kind := podSide.Type()
	if kind != "veth" && kind != "netkit" {
		return nil, newUnsupportedError(podSide, fmt.Sprintf("it is a %s and no veth, so its packets pass by the host's rules", kind))
	}
	errElsewhere := newUnsupportedError(podSide, fmt.Sprintf("its %s does not lead to this namespace of the host", kind))
	podID, err := host.GetNetNsIdByFd(int(pod))
	if err != nil {
		return nil, fmt.Errorf("the host's ID of the namespace of %s: %w", name, err)
	}
	if podID < 0 {
		// The kernel assigns an ID to each namespace that a link of this one leads to.
		return nil, errElsewhere
	}
	hostSide, err := host.LinkByIndex(podSide.Attrs().ParentIndex)
	if isNotFound(err) {
		return nil, errElsewhere
	}
	if err != nil {
		return nil, fmt.Errorf("peer of %s: %w", name, err)
	}
	attrs := hostSide.Attrs()
	if hostSide.Type() != kind || attrs.ParentIndex != podSide.Attrs().Index || attrs.NetNsID != podID {
		return nil, errElsewhere
	}
	if !isPrimary(hostSide) {
		return nil, newUnsupportedError(podSide, "its netkit's primary side is the pod's, which manages the programs that its packets pass")
	}
	return hostSide, nil
}

// isPrimary returns true for a veth, whose sides are equal.
func isPrimary(link netlink.Link) bool {
	netkit, ok := link.(*netlink.Netkit)
	return !ok || netkit.IsPrimary()
}

// setMaster describes a host side that has a master, which receives its packets before the IP
// layer.
func (l *Link) setMaster(master, podSide netlink.Link) (err error) {
	if kind := master.Type(); kind != "bridge" {
		err := newUnsupportedError(podSide, fmt.Sprintf("its host side %s belongs to %s, which is a %s and no bridge, so its packets pass by the host's rules",
			l.Name, master.Attrs().Name, kind))
		err.HostLink, err.HostIndex = l.Name, l.Index
		return err
	}
	l.Bridge = master.Attrs().Name
	if l.BridgeNF, err = bridgeNF(master.Attrs().Index); err != nil {
		return fmt.Errorf("bridge %s: %w", l.Bridge, err)
	}
	return nil
}

func isNotFound(err error) bool {
	_, notFound := errors.AsType[netlink.LinkNotFoundError](err)
	return notFound
}
