package attach

import (
	"context"
	"errors"
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
	if link.IsFiltered && datapath != attachment.DatapathPod {
		if err := n.checkSeen(ctx, req, link, ips[0]); err != nil {
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

// findLink returns the host side of the interface and the datapath. An interface that is not one
// side of a pair has no host side and can be redirected inside the pod only. A veth without a host
// side here may be a fault, so only the configuration selects the pod's datapath for it.
func (n *Node) findLink(req Request) (*hostlink.Link, attachment.Datapath, error) {
	link, err := n.FindLink(req.Netns, req.IfName)
	unsupported, isUnsupported := errors.AsType[*hostlink.UnsupportedError](err)
	if isUnsupported && !unsupported.IsLoopback() && (n.PodDatapath || unsupported.Kind != "veth") {
		n.log.Warn("The interface's packets do not pass the host's rules: the redirection is made inside the pod, which can remove it, and the node's guard does not see them.",
			"container", req.ContainerID, "interface", req.IfName, "namespace", req.Pod.Namespace, "pod", req.Pod.Name, "reason", unsupported.Reason)
		return &hostlink.Link{Name: unsupported.HostLink, Index: unsupported.HostIndex, IPs: unsupported.IPs}, attachment.DatapathPod, nil
	}
	if err != nil {
		return nil, "", wrap(KindLink, err)
	}
	switch {
	case n.PodDatapath:
		return link, attachment.DatapathPod, nil
	case link.Bridge != "":
		return link, attachment.DatapathBridged, nil
	}
	return link, attachment.DatapathRouted, nil
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

// checkSeen returns an error if the host's netfilter does not see a packet of a pod whose host side
// has a filter that comes before netfilter, for example a BPF program. Some filters bypass
// netfilter (the eBPF host routing of Cilium and Calico), most do not (network policies, traffic
// shaping).
//
// Silence proves nothing: a policy can have dropped the packet, or a neighbour can have drawn it to
// itself by ARP. So the ADD is refused and not moved to the pod's datapath, because only the host's
// rules bind the pod's address to its link. An administrator whose datapath bypasses netfilter
// selects the pod's datapath in the configuration.
func (n *Node) checkSeen(ctx context.Context, req Request, link *hostlink.Link, ip netip.Addr) error {
	isSeen, err := n.IsSeen(ctx, req.Netns, ip)
	if err != nil {
		return wrap(KindLink, fmt.Errorf("whether netfilter sees what enters by %s, where a filter comes before it: %w", link.Name, err))
	}
	if !isSeen {
		return wrap(KindLink, &hostlink.UnsupportedError{IfName: req.IfName, Kind: "veth",
			Reason: fmt.Sprintf("a filter at its host side %s comes before netfilter, which did not see a packet that was sent to find out", link.Name)})
	}
	return nil
}

// IsSeen reports whether the host's netfilter sees a packet that is sent from the pod's address.
// The shared lock keeps the agent from removing the probe's table as one of a killed process.
func (n *Node) IsSeen(ctx context.Context, netnsPath string, ip netip.Addr) (bool, error) {
	unlock, err := n.Records.LockShared(ctx)
	if err != nil {
		return false, wrap(KindState, err)
	}
	defer unlock()
	return n.Rules.IsSeen(ctx, netnsPath, ip, n.Metadata(ip))
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
	backend, err := n.Rules.Choose(ctx, n.Backend)
	if err != nil {
		return "", wrap(KindRules, err)
	}
	if backend == attachment.BackendNFTables || datapath != attachment.DatapathBridged {
		return backend, nil
	}
	for _, redirect := range redirects {
		if family := ipfamily.Of(redirect.Source); !link.BridgeNF.Has(family) {
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
