// Command calicolike is a CNI plugin that connects a pod as Calico does without eBPF. Calico itself
// needs a datastore and a daemon.
//
// The host side of the veth has no address. It answers ARP for the pod's next hop, 169.254.1.1, and
// a route of the host leads to the pod. With "device": "netkit" the pair is a pair of netkit
// devices (Linux 6.7).
package main

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
	"github.com/containernetworking/plugins/pkg/ipam"
	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"
)

// nextHop is the pod's gateway, an address of no interface (Calico FAQ, "Why does my container have
// a route to 169.254.1.1?").
var nextHop = net.IPv4(169, 254, 1, 1)

func main() {
	skel.PluginMainFuncs(skel.CNIFuncs{Add: add, Del: del, Check: func(*skel.CmdArgs) error { return nil }}, version.All, "calicolike")
}

// hostName returns the name of the host side: "cali" and part of a hash, as Calico's.
func hostName(args *skel.CmdArgs) string {
	sum := sha256.Sum256([]byte(args.ContainerID + args.IfName))
	return "cali" + hex.EncodeToString(sum[:])[:11]
}

func add(args *skel.CmdArgs) error {
	conf := struct {
		types.PluginConf
		Device string `json:"device"`
	}{}
	if err := json.Unmarshal(args.StdinData, &conf); err != nil {
		return err
	}
	given, err := ipam.ExecAdd(conf.IPAM.Type, args.StdinData)
	if err != nil {
		return err
	}
	result, err := types100.NewResultFromResult(given)
	if err != nil {
		return err
	}
	pod, err := ns.GetNS(args.Netns)
	if err != nil {
		return err
	}
	defer pod.Close()
	host := hostName(args)
	var pair netlink.Link = &netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: host}, PeerName: args.IfName, PeerNamespace: netlink.NsFd(pod.Fd()),
	}
	if conf.Device == "netkit" {
		netkit := &netlink.Netkit{LinkAttrs: netlink.LinkAttrs{Name: host}, Mode: netlink.NETKIT_MODE_L2}
		netkit.SetPeerAttrs(&netlink.LinkAttrs{Name: args.IfName, Namespace: netlink.NsFd(pod.Fd())})
		pair = netkit
	}
	if err := netlink.LinkAdd(pair); err != nil {
		return fmt.Errorf("%s %s: %w", pair.Type(), host, err)
	}
	if err := pod.Do(func(ns.NetNS) error { return inPod(args.IfName, result) }); err != nil {
		return err
	}
	if err := onHost(host, result); err != nil {
		return err
	}
	result.Interfaces = []*types100.Interface{{Name: host}} // Calico lists the host side only
	return types.PrintResult(result, conf.CNIVersion)
}

func inPod(name string, result *types100.Result) error {
	link, err := up(name)
	if err != nil {
		return err
	}
	for _, ip := range result.IPs {
		if ip.Address.IP.To4() == nil {
			continue
		}
		one := &net.IPNet{IP: ip.Address.IP, Mask: net.CIDRMask(32, 32)}
		if err := netlink.AddrAdd(link, &netlink.Addr{IPNet: one}); err != nil {
			return err
		}
		ip.Address, ip.Gateway = *one, nil
	}
	if err := netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: &net.IPNet{IP: nextHop, Mask: net.CIDRMask(32, 32)}, Scope: netlink.SCOPE_LINK}); err != nil {
		return err
	}
	return netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: nextHop})
}

func onHost(name string, result *types100.Result) error {
	link, err := up(name)
	if err != nil {
		return err
	}
	if err := os.WriteFile("/proc/sys/net/ipv4/conf/"+name+"/proxy_arp", []byte("1"), 0o644); err != nil {
		return err
	}
	for _, ip := range result.IPs {
		if err := netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: &ip.Address, Scope: netlink.SCOPE_LINK}); err != nil {
			return err
		}
	}
	return nil
}

func up(name string) (netlink.Link, error) {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return nil, err
	}
	return link, netlink.LinkSetUp(link)
}

func del(args *skel.CmdArgs) error {
	conf := types.PluginConf{}
	if err := json.Unmarshal(args.StdinData, &conf); err != nil {
		return err
	}
	if err := ipam.ExecDel(conf.IPAM.Type, args.StdinData); err != nil {
		return err
	}
	link, err := netlink.LinkByName(hostName(args))
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil
	}
	if err != nil {
		return err
	}
	return netlink.LinkDel(link)
}
