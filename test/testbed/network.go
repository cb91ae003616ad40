package testbed

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/test/netnstest"
)

// connect makes the node's and the aws namespace and the link between them.
func (b *Bed) connect(bridgeNF bool) (err error) {
	if bridgeNF {
		if err := loadBridgeNF(); err != nil {
			return err
		}
	}
	if b.AWS, err = b.newNetns("aws"); err != nil {
		return err
	}
	if b.Node, err = b.newNetns("node"); err != nil {
		return err
	}
	if err := b.Node.Do(func() error { return addVeth("eth0", b.AWS) }); err != nil {
		return fmt.Errorf("link from node to aws: %w", err)
	}
	if b.primary == "macvlan" || b.primary == "ipvlan" {
		defer func() {
			if err == nil {
				err = b.connectLAN()
			}
		}()
	}
	if b.ipv6 {
		defer func() {
			if err == nil {
				err = b.connect6()
			}
		}()
	}
	link := func(ip netip.Addr) netip.Prefix { return netip.PrefixFrom(ip, 24) }
	err = b.AWS.Do(func() error {
		if err := up("lo", netip.MustParsePrefix("169.254.169.254/32")); err != nil {
			return err
		}
		if err := up("eth0", link(AWSIP)); err != nil {
			return err
		}
		return route(PodSubnet, NodeIP)
	})
	if err != nil {
		return fmt.Errorf("aws namespace: %w", err)
	}
	err = b.Node.Do(func() error {
		if err := up("lo"); err != nil {
			return err
		}
		if err := up("eth0", link(NodeIP)); err != nil {
			return err
		}
		if err := route(netip.PrefixFrom(netip.IPv4Unspecified(), 0), AWSIP); err != nil {
			return err
		}
		if err := setBridgeNF(bridgeNF); err != nil {
			return err
		}
		return setSysctl("net/ipv4/ip_forward", "1")
	})
	if err != nil {
		return fmt.Errorf("node namespace: %w", err)
	}
	return nil
}

// connect6 adds IPv6 to connect. Addresses are usable immediately, without duplicate address
// detection.
func (b *Bed) connect6() error {
	link := func(ip netip.Addr) netip.Prefix { return netip.PrefixFrom(ip, 64) }
	err := b.AWS.Do(func() error {
		if err := up("lo", netip.MustParsePrefix("fd00:ec2::254/128")); err != nil {
			return err
		}
		if err := up("eth0", link(AWSIP6)); err != nil {
			return err
		}
		return route(PodSubnet6, NodeIP6)
	})
	if err != nil {
		return fmt.Errorf("aws namespace, IPv6: %w", err)
	}
	err = b.Node.Do(func() error {
		if err := up("eth0", link(NodeIP6)); err != nil {
			return err
		}
		if err := setSysctl("net/ipv6/conf/all/forwarding", "1"); err != nil {
			return err
		}
		return route(netip.PrefixFrom(netip.IPv6Unspecified(), 0), AWSIP6)
	})
	if err != nil {
		return fmt.Errorf("node namespace, IPv6: %w", err)
	}
	return nil
}

// connectLAN adds a second interface to the node, on which pods with macvlan and ipvlan are. The
// gateway of that network is not the node, so the node's rules never see their packets.
func (b *Bed) connectLAN() error {
	if err := b.Node.Do(func() error { return addVeth(LAN, b.AWS) }); err != nil {
		return fmt.Errorf("lan: %w", err)
	}
	err := b.AWS.Do(func() error {
		if err := up(LAN, netip.PrefixFrom(LANIP, 24)); err != nil {
			return err
		}
		return setSysctl("net/ipv4/ip_forward", "1")
	})
	if err == nil {
		err = b.Node.Do(func() error { return up(LAN) })
	}
	if err != nil {
		return fmt.Errorf("lan: %w", err)
	}
	return nil
}

// LAN is the name of the node's second interface.
const LAN = "lan0"

// addVeth makes a veth pair whose ends have the same name, one of them in the other namespace.
func addVeth(name string, other *netnstest.Namespace) error {
	return netlink.LinkAdd(&netlink.Veth{
		LinkAttrs:     netlink.LinkAttrs{Name: name},
		PeerName:      name,
		PeerNamespace: netlink.NsFd(other.NsHandle),
	})
}

// up sets a link up after adding its addresses.
func up(name string, addresses ...netip.Prefix) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("link %s: %w", name, err)
	}
	for _, a := range addresses {
		address := &netlink.Addr{IPNet: ipNet(a)}
		if a.Addr().Is6() {
			address.Flags = unix.IFA_F_NODAD
		}
		if err := netlink.AddrAdd(l, address); err != nil {
			return fmt.Errorf("address %s of %s: %w", a, name, err)
		}
	}
	if err := netlink.LinkSetUp(l); err != nil {
		return fmt.Errorf("link %s: %w", name, err)
	}
	return nil
}

func route(to netip.Prefix, via netip.Addr) error {
	if err := netlink.RouteAdd(&netlink.Route{Dst: ipNet(to), Gw: net.IP(via.AsSlice())}); err != nil {
		return fmt.Errorf("route %s via %s: %w", to, via, err)
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: net.IP(p.Addr().AsSlice()), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// setSysctl sets a kernel parameter of the thread's network namespace.
func setSysctl(name, value string) error {
	return os.WriteFile("/proc/sys/"+name, []byte(value), 0o644)
}

const (
	bridgeNFKey  = "net/bridge/bridge-nf-call-iptables"
	bridgeNF6Key = "net/bridge/bridge-nf-call-ip6tables"
)

// setBridgeNF sets whether iptables sees frames that cross the bridges of the thread's network
// namespace.
func setBridgeNF(on bool) error {
	value := "0"
	if on {
		value = "1"
	}
	for _, key := range []string{bridgeNFKey, bridgeNF6Key} {
		// Without the module there is no such parameter, and nothing to disable.
		if err := setSysctl(key, value); err != nil && (on || !errors.Is(err, fs.ErrNotExist)) {
			return err
		}
	}
	return nil
}

// loadBridgeNF loads the kernel module br_netfilter, which Kubernetes requires of a node. It
// disables it for the host: otherwise the host's own iptables rules would see the frames of its
// bridges.
func loadBridgeNF() error {
	if _, err := os.Stat("/proc/sys/" + bridgeNFKey); err == nil {
		return nil
	}
	if err := Require("modprobe"); err != nil {
		return err
	}
	if out, err := exec.Command("modprobe", "br_netfilter").CombinedOutput(); err != nil {
		return fmt.Errorf("modprobe br_netfilter: %w: %s", err, out)
	}
	for _, key := range []string{bridgeNFKey, bridgeNF6Key, "net/bridge/bridge-nf-call-arptables"} {
		if err := setSysctl(key, "0"); err != nil {
			return err
		}
	}
	return nil
}
