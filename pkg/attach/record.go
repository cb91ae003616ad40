package attach

import (
	"context"
	"fmt"
	"net/netip"
	"slices"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/hostlink"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/ipfamily"
)

// Request is one interface of one container, and its pod.
type Request struct {
	ContainerID, IfName string
	Netns               string
	Network             string
	Pod                 attachment.Pod
	// IPs are the addresses in the previous plugin's result, which can be of several interfaces.
	IPs []netip.Addr
}

// NewRecord returns the complete record of an attachment. It changes nothing, and waits for the
// pod's namespace, so callers hold no lock.
func (n *Node) NewRecord(ctx context.Context, req Request) (*attachment.Record, error) {
	link, datapath, err := n.findLink(req)
	if err != nil {
		return nil, err
	}
	ips, err := addressesOf(req, link)
	if err != nil {
		return nil, err
	}
	if link.CanBypass && datapath != attachment.DatapathPod {
		if err := n.checkNetfilter(ctx, req, link, ips[0]); err != nil {
			return nil, err
		}
	}
	redirects, err := n.redirects(ips)
	if err != nil {
		return nil, err
	}
	backend, err := n.backend(ctx, link, datapath, redirects)
	if err != nil {
		return nil, err
	}
	r := &attachment.Record{
		ContainerID: req.ContainerID,
		IfName:      req.IfName,
		Network:     req.Network,
		Netns:       req.Netns,
		Pod:         req.Pod,
		IPs:         ips,
		HostLink:    attachment.HostLink{Name: link.Name, Index: link.Index, Bridge: link.Bridge},
		Datapath:    datapath,
		Backend:     backend,
		Redirects:   redirects,
		Created:     n.Now().UTC(),
	}
	return r, wrap(KindRules, r.Validate())
}

// addressesOf returns the addresses of the result that the interface holds. The interface that a
// result names for an address is unreliable: many plugins name none, and some a wrong one. So the
// kernel says which addresses the interface holds, and the result which of them the network
// assigned: an address that the pod gave itself, or that belongs to another interface of the
// result, is not redirected.
func addressesOf(req Request, link *hostlink.Link) ([]netip.Addr, error) {
	var ips []netip.Addr
	for _, ip := range req.IPs {
		if slices.Contains(link.IPs, ip) && !slices.Contains(ips, ip) {
			ips = append(ips, ip)
		}
	}
	var err error
	switch {
	case len(req.IPs) == 0:
		err = fmt.Errorf("interface %s: prevResult has no IPs", req.IfName)
	case len(ips) == 0:
		err = fmt.Errorf("interface %s: it holds %v, and none of prevResult's %v", req.IfName, link.IPs, req.IPs)
	}
	return ips, wrap(KindAddresses, err)
}

// redirects returns a redirection for each address of a family in which the proxy can be reached.
// The guard refuses the requests of the other family. A pod that has addresses of that family only
// is an error.
func (n *Node) redirects(ips []netip.Addr) ([]attachment.Redirect, error) {
	proxies := make(map[ipfamily.Family]netip.Addr)
	var redirects []attachment.Redirect
	var reason error
	for _, ip := range ips {
		family := ipfamily.Of(ip)
		proxy, ok := proxies[family]
		if !ok {
			var err error
			if proxy, err = n.proxyIP(family); err != nil {
				reason = err
				n.log.Warn("address is not redirected, only guarded", "ip", ip, "error", err)
			}
			proxies[family] = proxy
		}
		if proxy.IsValid() {
			redirects = append(redirects, attachment.Redirect{Source: ip, Metadata: n.Metadata(ip), Proxy: netip.AddrPortFrom(proxy, n.ProxyPort)})
		}
	}
	if len(redirects) == 0 {
		return nil, wrap(KindProxyIP, fmt.Errorf("no proxy address for %v: %w", ips, reason))
	}
	return redirects, nil
}

func (n *Node) proxyIP(family ipfamily.Family) (netip.Addr, error) {
	if !n.ProxyIP.IsValid() {
		return n.NodeIP(family)
	}
	if ipfamily.Of(n.ProxyIP) != family {
		return netip.Addr{}, fmt.Errorf("proxyIP %s is of another family", n.ProxyIP)
	}
	return n.ProxyIP, nil
}

// backend returns the backend of a new attachment. iptables sees the port of a bridged pod only
// with bridge-nf.
func (n *Node) backend(ctx context.Context, link *hostlink.Link, datapath attachment.Datapath, redirects []attachment.Redirect) (attachment.Backend, error) {
	if datapath == attachment.DatapathPod {
		return attachment.BackendNFTables, nil
	}
	backend, err := n.Rules.ChooseBackend(ctx, n.Backend)
	if err != nil {
		return "", wrap(KindRules, err)
	}
	if backend == attachment.BackendNFTables || datapath != attachment.DatapathBridged {
		return backend, nil
	}
	for _, redirect := range redirects {
		if family := ipfamily.Of(redirect.Source); !link.BridgeNF[family] {
			return "", wrap(KindBridge, fmt.Errorf("%s is a port of the bridge %s, and bridge-nf is off for %s: iptables does not see the port", link.Name, link.Bridge, family))
		}
	}
	return backend, nil
}

// compare returns the differences between a record and the pod's interface.
func compare(r *attachment.Record, link *hostlink.Link, datapath attachment.Datapath, ips []netip.Addr) []string {
	var differences []string
	now := attachment.HostLink{Name: link.Name, Index: link.Index, Bridge: link.Bridge}
	if now != r.HostLink || datapath != r.Datapath {
		differences = append(differences, fmt.Sprintf("host interface is %+v (%s), recorded is %+v (%s)", now, datapath, r.HostLink, r.Datapath))
	}
	for _, ip := range ips {
		if !slices.Contains(r.IPs, ip) {
			differences = append(differences, fmt.Sprintf("%s is not on record", ip))
		}
	}
	for _, ip := range r.IPs {
		if !slices.Contains(ips, ip) {
			differences = append(differences, fmt.Sprintf("%s is on record, and the interface or prevResult does not have it", ip))
		}
	}
	return differences
}
