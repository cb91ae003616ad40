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

	"github.com/kube2iam-cni/kube2iam-cni/pkg/ipfamily"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/podnetns"
)

// Link is the host side of a pod's veth or netkit pair.
type Link struct {
	Name  string
	Index int
	// Bridge is the bridge that the host side is a port of. If it is empty, the pod's packets enter
	// the host's IP layer through the link itself.
	Bridge string
	// BridgeNF has the families for which iptables sees the bridge's packets.
	BridgeNF map[ipfamily.Family]bool
	// CanBypass is true if a BPF program or a tc filter sees the link's packets before netfilter. Such
	// a program can send packets past netfilter.
	CanBypass bool
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
	// Kind is the kernel's name for the kind of interface, such as "macvlan", "ipvlan" or "veth". A
	// physical interface is a "device".
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
// It trusts only the kernel. The host interface that a CNI plugin reports is unreliable: azure-vnet
// reports the node's uplink, aws-cni one that does not exist, weave none. A parent index is not
// enough: a macvlan also has one, that of the uplink. So the two interfaces must be of the same
// kind, veth or netkit, and each must refer to the other by its index and its namespace.
func Find(netnsPath, ifName string) (*Link, error) {
	pod, podSide, ips, err := openInterface(netnsPath, ifName)
	if err != nil {
		return nil, err
	}
	defer pod.Close()
	link := &Link{IPs: ips}
	reason, err := link.findHostSide(pod, podSide)
	if err != nil {
		return nil, fmt.Errorf("host side of %s in %s: %w", ifName, netnsPath, err)
	}
	if reason == "" {
		return link, nil
	}
	kind := podSide.Type()
	if podSide.Attrs().Flags&net.FlagLoopback != 0 {
		kind = kindLoopback
	}
	return nil, &UnsupportedError{IfName: ifName, Reason: reason, Kind: kind, IPs: ips, HostLink: link.Name, HostIndex: link.Index}
}

// openInterface opens the namespace at netnsPath and returns it with its interface ifName and the
// interface's addresses. The caller closes the namespace, unless there is an error.
func openInterface(netnsPath, ifName string) (pod netns.NsHandle, podSide netlink.Link, ips []netip.Addr, err error) {
	pod, err = podnetns.Open(netnsPath)
	if err != nil {
		return pod, nil, nil, fmt.Errorf("%w: %w", ErrNetns, err)
	}
	defer func() {
		if err != nil {
			pod.Close()
		}
	}()
	h, err := netlink.NewHandleAt(pod, unix.NETLINK_ROUTE)
	if err != nil {
		return pod, nil, nil, fmt.Errorf("%s: %w", netnsPath, err)
	}
	defer h.Close()
	podSide, err = h.LinkByName(ifName)
	if isNotFound(err) {
		return pod, nil, nil, fmt.Errorf("%w: %s in %s", ErrNoInterface, ifName, netnsPath)
	}
	if err == nil {
		ips, err = addresses(pod, podSide.Attrs().Index)
	}
	if err != nil {
		return pod, nil, nil, fmt.Errorf("interface %s in %s: %w", ifName, netnsPath, err)
	}
	return pod, podSide, ips, nil
}

// findHostSide sets the fields of l that concern the host side. If the host's rules cannot match
// the pod's packets, it returns the reason.
func (l *Link) findHostSide(pod netns.NsHandle, podSide netlink.Link) (reason string, err error) {
	kind := podSide.Type()
	if kind != "veth" && kind != "netkit" {
		return fmt.Sprintf("a %s is no veth: its packets do not pass the host's rules", kind), nil
	}
	host, err := findPeer(pod, podSide)
	switch {
	case err != nil:
		return "", err
	case host == nil:
		return fmt.Sprintf("its %s does not lead to this namespace of the host", kind), nil
	case !isPrimary(host):
		return "its netkit's primary side is the pod's, which manages the programs that its packets pass", nil
	}
	l.Name, l.Index = host.Attrs().Name, host.Attrs().Index
	if index := host.Attrs().MasterIndex; index != 0 {
		master, err := netlink.LinkByIndex(index)
		if err != nil {
			return "", fmt.Errorf("master of %s: %w", l.Name, err)
		}
		if reason := l.setMaster(master); reason != "" {
			return reason, nil
		}
		if l.BridgeNF, err = bridgeNF(); err != nil {
			return "", err
		}
	}
	l.CanBypass, err = canBypass(host)
	return "", err
}

// setMaster sets l.Bridge to the master of the host side, which receives the host side's packets
// before the IP layer. If the master is not a bridge, it returns the reason why the rules cannot
// match.
func (l *Link) setMaster(master netlink.Link) (reason string) {
	if kind := master.Type(); kind != "bridge" {
		return fmt.Sprintf("its host side %s belongs to %s, which is a %s and no bridge: its packets do not pass the host's rules",
			l.Name, master.Attrs().Name, kind)
	}
	l.Bridge = master.Attrs().Name
	return ""
}

// findPeer returns the other side of the pod's veth or netkit pair, or nil if it is not in this
// namespace. As with a veth, the packets that the pod sends through a netkit enter the receive path
// of the host side, where the host's rules see them. A BPF program on the pair can redirect them
// before that.
func findPeer(pod netns.NsHandle, podSide netlink.Link) (netlink.Link, error) {
	podID, err := netlink.GetNetNsIdByFd(int(pod))
	if err != nil {
		return nil, fmt.Errorf("the host's ID of the namespace: %w", err)
	}
	if podID < 0 {
		// The kernel assigns an ID to every namespace that has the peer of a link in this one. So no
		// link of this namespace has its peer in the pod's.
		return nil, nil
	}
	hostSide, err := netlink.LinkByIndex(podSide.Attrs().ParentIndex)
	if isNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("peer: %w", err)
	}
	attrs := hostSide.Attrs()
	if hostSide.Type() != podSide.Type() || attrs.ParentIndex != podSide.Attrs().Index || attrs.NetNsID != podID {
		return nil, nil
	}
	return hostSide, nil
}

// isPrimary reports whether a host side is the primary side of its pair: the side that manages the
// pair's programs (drivers/net/netkit.c). It returns true for a veth, which has no primary side.
func isPrimary(link netlink.Link) bool {
	netkit, ok := link.(*netlink.Netkit)
	return !ok || netkit.IsPrimary()
}

func isNotFound(err error) bool {
	_, notFound := errors.AsType[netlink.LinkNotFoundError](err)
	return notFound
}
