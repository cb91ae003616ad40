package imds

import (
	"net/netip"
	"slices"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
)

// Redirected returns the Destinations of this node's rules. They redirect what is sent to a well-known
// metadata service address or to configured, unless that is a loopback address, and what the record of
// the source's attachment names.
//
// The kernel of the node does not see a redirection inside a pod's network namespace: such a connection
// is destined for the proxy's own address. It counts only if the record says so.
func Redirected(records *attachment.Index, configured netip.Addr) Destinations {
	const port = 80
	known := []netip.AddrPort{
		netip.AddrPortFrom(netip.MustParseAddr("169.254.169.254"), port),
		netip.AddrPortFrom(netip.MustParseAddr("fd00:ec2::254"), port),
	}
	if configured.IsValid() && !configured.IsLoopback() {
		known = append(known, netip.AddrPortFrom(configured, port))
	}
	return func(source netip.Addr, destination netip.AddrPort) bool {
		if slices.Contains(known, destination) {
			return true
		}
		record, err := records.Holder(source)
		if err != nil || record == nil {
			return false
		}
		return slices.ContainsFunc(record.Redirects, func(r attachment.Redirect) bool {
			inPod := record.Datapath == attachment.DatapathPod && r.Proxy == destination
			return r.Source == source && (inPod || r.Metadata == destination)
		})
	}
}
