package attach

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/hostlink"
)

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

// checkNetfilter returns an error if the host's netfilter does not see a packet of a pod whose host
// side has a filter that runs before netfilter, for example a BPF program. Some filters bypass
// netfilter (the eBPF host routing of Cilium and Calico), most do not (network policies, traffic
// shaping).
//
// A missing packet does not prove a bypass: a policy can have dropped it, or a neighbour can have
// received it by ARP spoofing. So the ADD is refused and not moved to the pod's datapath, because
// only the host's rules bind the pod's address to its link. An administrator whose datapath
// bypasses netfilter selects the pod's datapath in the configuration.
func (n *Node) checkNetfilter(ctx context.Context, req Request, link *hostlink.Link, ip netip.Addr) error {
	passes, err := n.PassesNetfilter(ctx, req.Netns, ip)
	if err != nil {
		return wrap(KindLink, fmt.Errorf("whether netfilter sees what enters by %s, where a filter comes before it: %w", link.Name, err))
	}
	if !passes {
		return wrap(KindLink, &hostlink.UnsupportedError{IfName: req.IfName, Kind: "veth",
			Reason: fmt.Sprintf("a filter at its host side %s comes before netfilter, which did not see a packet that was sent to find out", link.Name)})
	}
	return nil
}

// PassesNetfilter reports whether the host's netfilter sees a packet from the pod's address.
// The shared lock keeps the agent from removing the probe's table as one of a killed process.
func (n *Node) PassesNetfilter(ctx context.Context, netnsPath string, ip netip.Addr) (bool, error) {
	unlock, err := n.Records.LockShared(ctx)
	if err != nil {
		return false, wrap(KindState, err)
	}
	defer unlock()
	return n.Rules.PassesNetfilter(ctx, netnsPath, ip, n.Metadata(ip))
}
