package node

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/hostlink"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/redirect"
)

// Request is one interface of one container, and the pod that it is.
type Request struct {
	ContainerID, IfName string
	Netns               string
	Network             string
	Pod                 attachment.Pod
	// IPs are the addresses that the network gave to the container, not necessarily to this interface.
	IPs []netip.Addr
}

// plan is what an attachment comes to, all but the backend.
type plan struct {
	*attachment.Record
	bridgeNF hostlink.BridgeNF
}

// plan looks, and changes nothing.
func (n *Node) plan(r Request) (*plan, error) {
	link, path, err := n.look(r)
	if err != nil {
		return nil, err
	}
	ips, err := own(r.IPs, link.IPs)
	if err != nil {
		return nil, &Error{Addresses, fmt.Errorf("interface %s: %w", r.IfName, err)}
	}
	if link.Filtered && path != attachment.DatapathPod {
		if err := n.behindFilter(r, link, ips[0]); err != nil {
			return nil, err
		}
	}
	record := &attachment.Record{
		ContainerID: r.ContainerID,
		IfName:      r.IfName,
		Network:     r.Network,
		Netns:       r.Netns,
		Pod:         r.Pod,
		IPs:         ips,
		HostLink:    attachment.HostLink{Name: link.Name, Index: link.Index, Bridge: link.Bridge},
		Datapath:    path,
		Created:     n.Now().UTC(),
	}
	if record.Redirects, err = n.redirects(ips); err != nil {
		return nil, err
	}
	return &plan{record, link.BridgeNF}, nil
}

// look finds the host side of the interface, and where its packets can be redirected. An interface that is no pair has no
// host side: they can only inside the pod.
func (n *Node) look(r Request) (*hostlink.Link, attachment.Datapath, error) {
	link, err := n.FindLink(r.Netns, r.IfName)
	if unsupported, ok := errors.AsType[*hostlink.UnsupportedError](err); ok && !unsupported.Loopback() && (n.InPod || unsupported.Kind != "veth") {
		n.Log.Warn("the interface's packets do not pass the host's rules: the redirection is made inside the pod, which can undo it, and the node's guard does not see them",
			"container", r.ContainerID, "interface", r.IfName, "namespace", r.Pod.Namespace, "pod", r.Pod.Name, "why", unsupported.Why)
		return &hostlink.Link{Name: unsupported.HostLink, Index: unsupported.HostIndex, IPs: unsupported.IPs}, attachment.DatapathPod, nil
	}
	if err != nil {
		return nil, "", about(Link, err)
	}
	switch {
	case n.InPod:
		return link, attachment.DatapathPod, nil
	case link.Bridge != "":
		return link, attachment.DatapathBridged, nil
	}
	return link, attachment.DatapathRouted, nil
}

// behindFilter is for a veth whose packets something sees before netfilter does, a BPF program most likely. Some take them past
// it (Cilium's and Calico's eBPF host routing), most do not (network policies, shaping): so one is sent, and netfilter says
// whether it came.
//
// Silence proves nothing: a policy may have dropped the packet, or a neighbour drawn it to himself by ARP. So it is never a
// reason to give up the host's rules, which bind the pod's address to its link, but one to refuse: whoever knows that his
// datapath passes netfilter by says so with InPod.
func (n *Node) behindFilter(r Request, link *hostlink.Link, ip netip.Addr) error {
	seen, err := n.seen(context.Background(), r.Netns, ip)
	if err != nil {
		return about(Link, fmt.Errorf("whether netfilter sees what enters by %s, where a filter comes before it: %w", link.Name, err))
	}
	if !seen {
		return about(Link, &hostlink.UnsupportedError{IfName: r.IfName, Kind: "veth",
			Why: fmt.Sprintf("a filter at its host side %s comes before netfilter, which did not see a packet that was sent to find out", link.Name)})
	}
	return nil
}

// own are the addresses of the network that the interface holds. Which interface a result means by an address cannot be
// relied on: many plugins name none, and some a host's or one that does not exist. So the kernel says which are the
// interface's own, and the result which of those the network gave it: an address that a pod could have given itself in
// the meantime, or that another interface of the same result has, is not redirected from here.
func own(given, held []netip.Addr) ([]netip.Addr, error) {
	var own []netip.Addr
	for _, ip := range given {
		if slices.Contains(held, ip) && !slices.Contains(own, ip) {
			own = append(own, ip)
		}
	}
	if len(given) == 0 {
		return nil, errors.New("prevResult has no IPs")
	}
	if len(own) == 0 {
		return nil, fmt.Errorf("it holds %v, and none of prevResult's %v", held, given)
	}
	return own, nil
}

// redirects is one for each address of a family in which the proxy can be reached. In the other, pods are refused by the
// guard; a pod that has no address but such ones is an error.
func (n *Node) redirects(ips []netip.Addr) ([]attachment.Redirect, error) {
	proxies := make(map[bool]netip.Addr)
	var redirects []attachment.Redirect
	var reason error
	for _, ip := range ips {
		proxy, asked := proxies[ip.Is6()]
		if !asked {
			var err error
			if proxy, err = n.proxyIP(ip); err != nil {
				reason = err
				n.Log.Warn("address is not redirected, only guarded", "ip", ip, "error", err)
			}
			proxies[ip.Is6()] = proxy
		}
		if proxy.IsValid() {
			redirects = append(redirects, attachment.Redirect{
				Source:   ip,
				Metadata: n.metadataFor(ip),
				Proxy:    netip.AddrPortFrom(proxy, n.ProxyPort),
			})
		}
	}
	if len(redirects) == 0 {
		return nil, &Error{ProxyAddress, fmt.Errorf("no proxy address for %v: %w", ips, reason)}
	}
	return redirects, nil
}

// proxyIP is the proxy's address for the family of ip.
func (n *Node) proxyIP(ip netip.Addr) (netip.Addr, error) {
	if n.ProxyIP.IsValid() {
		if n.ProxyIP.Is6() != ip.Is6() {
			return netip.Addr{}, fmt.Errorf("proxyIP %s is of another family", n.ProxyIP)
		}
		return n.ProxyIP, nil
	}
	if ip.Is6() {
		return n.NodeIP(hostlink.IPv6)
	}
	return n.NodeIP(hostlink.IPv4)
}

// choose settles how the plan's rules are programmed. iptables on a bridge sees the port only with bridge-nf; where that is
// off for a family of the pod, it matches a mark that the bridge's own table sets at the port.
func (p *plan) choose(n *Node, b redirect.Backend) error {
	p.Backend = attachment.Backend(b.Form())
	if p.Datapath != attachment.DatapathBridged || b.Form() == redirect.NFTables {
		return nil
	}
	if portsSeen(p.Record, p.bridgeNF) {
		return nil
	}
	p.Mark = n.Mark
	return about(Mark, hostlink.FreeMark(p.Mark))
}

// portsSeen tells whether iptables sees the port of everything that a record redirects.
func portsSeen(r *attachment.Record, nf hostlink.BridgeNF) bool {
	for _, one := range r.Redirects {
		if one.Source.Is6() && !nf.IPv6 || one.Source.Is4() && !nf.IPv4 {
			return false
		}
	}
	return true
}
