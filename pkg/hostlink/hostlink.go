// Package hostlink finds the host side of a pod's interface, and how the pod's packets enter the host by it.
package hostlink

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Link is the host side of a pod's veth or netkit pair.
type Link struct {
	// Name and Index are the host side's.
	Name  string
	Index int
	// Bridge is the bridge that the host side is a port of; empty where it has no master, and the pod's packets enter the
	// host's IP layer by the link itself.
	Bridge string
	// BridgeNF says which of the packets that enter by the bridge iptables sees with their port; false for both without a
	// bridge.
	BridgeNF BridgeNF
	// Filtered says that something sees the link's packets before netfilter does, and may take them past it.
	Filtered bool
	// IPs are the addresses of the pod's side that other machines can dial, in the kernel's order.
	IPs []netip.Addr
}

// ErrNetns is the error of a network namespace that cannot be used: there is none at the path, or it is the host's own.
var ErrNetns = errors.New("network namespace")

// ErrNoInterface is the error of an interface that the namespace does not have.
var ErrNoInterface = errors.New("no such interface")

// UnsupportedError is the error of an interface whose packets do not enter the host in a way that can be matched there.
type UnsupportedError struct {
	IfName string
	Why    string
	// Kind is the kernel's word for what the interface is: "macvlan", "ipvlan", "veth"; "device" is a real one.
	Kind string
	// IPs are the interface's, as a Link has them.
	IPs []netip.Addr
	// HostLink and HostIndex are the host side of a veth that has a master whose packets cannot be matched.
	HostLink  string
	HostIndex int
}

// Loopback tells an interface that leads nowhere.
func (e *UnsupportedError) Loopback() bool { return e.Kind == loopback }

const loopback = "loopback"

func (e *UnsupportedError) Error() string { return fmt.Sprintf("interface %s: %s", e.IfName, e.Why) }

// Find is the host side of ifName in the namespace at netnsPath; the host's is the namespace of the calling thread.
//
// It asks the kernel only. What a CNI plugin reports as its host interface is not a source: azure-vnet reports the node's
// uplink, aws-cni one that does not exist, weave none. And a parent index alone proves nothing: a macvlan has one too, and
// it is the uplink's. So both sides must be veths, or both a netkit's, and point at each other: by index, and by the namespace that the index
// counts in.
func Find(netnsPath, ifName string) (*Link, error) {
	pod, err := netns.GetFromPath(netnsPath)
	if err != nil {
		return nil, fmt.Errorf("%w %q: %w", ErrNetns, netnsPath, err)
	}
	defer pod.Close()
	if err := differs(pod, netnsPath); err != nil {
		return nil, err
	}
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

	inPod, err := podLinks.LinkByName(ifName)
	if missing(err) {
		return nil, fmt.Errorf("%w: %s in %s", ErrNoInterface, ifName, netnsPath)
	}
	if err != nil {
		return nil, fmt.Errorf("interface %s in %s: %w", ifName, netnsPath, err)
	}
	ips, err := addresses(pod, inPod.Attrs().Index)
	if err != nil {
		return nil, fmt.Errorf("addresses of %s in %s: %w", ifName, netnsPath, err)
	}
	link, err := hostSide(hostLinks, pod, inPod)
	var unsupported *UnsupportedError
	if errors.As(err, &unsupported) {
		unsupported.IPs = ips
	}
	if err != nil {
		return nil, err
	}
	link.IPs = ips
	return link, nil
}

func hostSide(host *netlink.Handle, pod netns.NsHandle, inPod netlink.Link) (*Link, error) {
	onHost, err := peer(host, pod, inPod)
	if err != nil {
		return nil, err
	}
	link := &Link{Name: onHost.Attrs().Name, Index: onHost.Attrs().Index}
	if link.Filtered, err = filtered(host, onHost); err != nil {
		return nil, err
	}
	if index := onHost.Attrs().MasterIndex; index != 0 {
		master, err := host.LinkByIndex(index)
		if err != nil {
			return nil, fmt.Errorf("master of %s: %w", link.Name, err)
		}
		if err := link.enterBy(master, inPod); err != nil {
			return nil, err
		}
	}
	return link, nil
}

func unsupported(inPod netlink.Link, why string) *UnsupportedError {
	kind := inPod.Type()
	if inPod.Attrs().Flags&net.FlagLoopback != 0 {
		kind = loopback
	}
	return &UnsupportedError{IfName: inPod.Attrs().Name, Why: why, Kind: kind}
}

func differs(pod netns.NsHandle, path string) error {
	own, err := isHost(pod)
	if own {
		return fmt.Errorf("%w %q is the host's own", ErrNetns, path)
	}
	return err
}

// isHost reports whether a namespace is that of the calling thread, by device and inode.
func isHost(pod netns.NsHandle) (bool, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	host, err := netns.Get()
	if err != nil {
		return false, fmt.Errorf("the host's %w: %w", ErrNetns, err)
	}
	defer host.Close()
	return host.Equal(pod), nil
}

// peer is the other side of the pod's veth or netkit pair. A netkit device hands what one side sends to the other's receive path,
// where the host's rules see it, unless a program on the pair takes it. Programs are managed by the primary side, so that has
// to be the host's (drivers/net/netkit.c).
func peer(host *netlink.Handle, pod netns.NsHandle, inPod netlink.Link) (netlink.Link, error) {
	name := inPod.Attrs().Name
	kind := inPod.Type()
	if kind != "veth" && kind != "netkit" {
		return nil, unsupported(inPod, fmt.Sprintf("it is a %s and no veth, so its packets pass by the host's rules", kind))
	}
	elsewhere := unsupported(inPod, fmt.Sprintf("its %s does not lead to this namespace of the host", kind))
	podID, err := host.GetNetNsIdByFd(int(pod))
	if err != nil {
		return nil, fmt.Errorf("the host's ID of the namespace of %s: %w", name, err)
	}
	if podID < 0 {
		// The kernel gives an ID to each namespace that a link of this one leads to.
		return nil, elsewhere
	}
	onHost, err := host.LinkByIndex(inPod.Attrs().ParentIndex)
	if missing(err) {
		return nil, elsewhere
	}
	if err != nil {
		return nil, fmt.Errorf("peer of %s: %w", name, err)
	}
	back := onHost.Attrs()
	if onHost.Type() != kind || back.ParentIndex != inPod.Attrs().Index || back.NetNsID != podID {
		return nil, elsewhere
	}
	if !primary(onHost) {
		return nil, unsupported(inPod, "its netkit's primary side is the pod's, which manages the programs that its packets pass")
	}
	return onHost, nil
}

// primary is true of a veth, whose sides are alike.
func primary(link netlink.Link) bool {
	netkit, ok := link.(*netlink.Netkit)
	return !ok || netkit.IsPrimary()
}

// enterBy is for a host side that has a master, which takes its packets before the IP layer does.
func (l *Link) enterBy(master, inPod netlink.Link) (err error) {
	if kind := master.Type(); kind != "bridge" {
		err := unsupported(inPod, fmt.Sprintf("its host side %s belongs to %s, which is a %s and no bridge, so its packets pass by the host's rules",
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

func missing(err error) bool {
	var notFound netlink.LinkNotFoundError
	return errors.As(err, &notFound)
}
