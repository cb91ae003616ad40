package main

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/hostlink"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/netconf"
)

// metadata6 is the service's IPv6 address (Amazon EC2 User Guide, "Access instance metadata"), which no configuration
// changes. Both addresses are served on port 80.
var metadata6 = netip.MustParseAddr("fd00:ec2::254")

const metadataPort = 80

// metadataFor is the service that an address's pod would dial.
func metadataFor(conf *netconf.Config) func(netip.Addr) netip.AddrPort {
	return func(ip netip.Addr) netip.AddrPort {
		if ip.Is6() {
			return netip.AddrPortFrom(metadata6, metadataPort)
		}
		return netip.AddrPortFrom(conf.MetadataIP, metadataPort)
	}
}

// plan is the record of what an ADD is to do, all but the backend. It looks, and changes nothing.
func (p *plugin) plan(conf *netconf.Config, args *skel.CmdArgs) (*attachment.Record, error) {
	if err := attachment.Valid(args.ContainerID, args.IfName); err != nil {
		return nil, coded(err, types.ErrInvalidEnvironmentVariables)
	}
	pod, err := netconf.ParsePod(args.Args)
	if err != nil {
		return nil, err
	}
	link, ips, err := p.look(conf, args)
	if err != nil {
		return nil, err
	}
	record := &attachment.Record{
		ContainerID: args.ContainerID,
		IfName:      args.IfName,
		Network:     conf.Name,
		Netns:       args.Netns,
		Pod:         attachment.Pod(pod),
		IPs:         ips,
		HostLink:    attachment.HostLink{Name: link.Name, Index: link.Index, Bridge: link.Bridge},
		Path:        attachment.PathRouted,
		Created:     p.now().UTC(),
	}
	if link.Bridge != "" {
		record.Path = attachment.PathBridged
	}
	if record.Redirects, err = p.redirects(conf, ips); err != nil {
		return nil, err
	}
	return record, seen(link, record.Redirects)
}

// look finds the host side of the pod's interface, and those of prevResult's addresses that are the interface's own.
func (p *plugin) look(conf *netconf.Config, args *skel.CmdArgs) (*hostlink.Link, []netip.Addr, error) {
	if conf.PrevResult == nil {
		return nil, nil, cniError(types.ErrInvalidNetworkConfig, "chain kube2iam-cni after the plugin that makes the interface",
			"prevResult is missing")
	}
	link, err := p.findLink(args.Netns, args.IfName)
	if err != nil {
		return nil, nil, coded(err, codeLink)
	}
	ips, err := ownIPs(conf.PrevResult, link.IPs)
	if err != nil {
		return nil, nil, coded(fmt.Errorf("interface %s: %w", args.IfName, err), codeAddresses)
	}
	return link, ips, nil
}

// ownIPs are the addresses of the result that the interface holds. Which interface a result means by an address cannot be
// relied on: many plugins name none, and some a host's or one that does not exist. So the kernel says which are the
// interface's own, and the result which of those the network gave it: an address that a pod could have given itself in
// the meantime, or that another interface of the same result has, is not redirected from here.
func ownIPs(prevResult types.Result, held []netip.Addr) ([]netip.Addr, error) {
	result, err := types100.NewResultFromResult(prevResult)
	if err != nil {
		return nil, err
	}
	var given, own []netip.Addr
	for _, config := range result.IPs {
		ip, _ := netip.AddrFromSlice(config.Address.IP)
		ip = ip.Unmap()
		given = append(given, ip)
		if slices.Contains(held, ip) && !slices.Contains(own, ip) {
			own = append(own, ip)
		}
	}
	if len(given) == 0 {
		return nil, fmt.Errorf("prevResult has no IPs")
	}
	if len(own) == 0 {
		return nil, fmt.Errorf("it holds %v, and none of prevResult's %v", held, given)
	}
	return own, nil
}

// redirects is one for each address of a family in which the proxy can be reached. In the other, pods are refused by the
// guard; a pod that has no address but such ones is an error.
func (p *plugin) redirects(conf *netconf.Config, ips []netip.Addr) ([]attachment.Redirect, error) {
	proxies := make(map[bool]netip.Addr)
	var redirects []attachment.Redirect
	var reason error
	for _, ip := range ips {
		proxy, asked := proxies[ip.Is6()]
		if !asked {
			var err error
			if proxy, err = p.proxyIP(conf, ip); err != nil {
				reason = err
				p.log.Warn("address is not redirected, only guarded", "ip", ip, "error", err)
			}
			proxies[ip.Is6()] = proxy
		}
		if proxy.IsValid() {
			redirects = append(redirects, attachment.Redirect{
				Source:   ip,
				Metadata: metadataFor(conf)(ip),
				Proxy:    netip.AddrPortFrom(proxy, conf.ProxyPort),
			})
		}
	}
	if len(redirects) == 0 {
		return nil, cniError(codeProxyIP, `set "proxyIP" to an address of this node, of the pod's family`,
			"no proxy address for %v: %v", ips, reason)
	}
	return redirects, nil
}

// proxyIP is the proxy's address for the family of ip.
func (p *plugin) proxyIP(conf *netconf.Config, ip netip.Addr) (netip.Addr, error) {
	if conf.ProxyIP.IsValid() {
		if conf.ProxyIP.Is6() != ip.Is6() {
			return netip.Addr{}, fmt.Errorf("proxyIP %s is of another family", conf.ProxyIP)
		}
		return conf.ProxyIP, nil
	}
	if ip.Is6() {
		return p.nodeIP(hostlink.IPv6)
	}
	return p.nodeIP(hostlink.IPv4)
}

// seen refuses a bridged pod whose packets iptables does not see with their port: its rule would never match.
func seen(link *hostlink.Link, redirects []attachment.Redirect) error {
	if link.Bridge == "" {
		return nil
	}
	for _, r := range redirects {
		sysctl, on := "net.bridge.bridge-nf-call-iptables", link.BridgeNF.IPv4
		if r.Source.Is6() {
			sysctl, on = "net.bridge.bridge-nf-call-ip6tables", link.BridgeNF.IPv6
		}
		if !on {
			return cniError(codeBridgeNF, "on the node: modprobe br_netfilter && sysctl -w "+sysctl+"=1",
				"%s is a port of the bridge %s, and %s is not 1, so iptables does not see which port a packet enters by",
				link.Name, link.Bridge, sysctl)
		}
	}
	return nil
}
