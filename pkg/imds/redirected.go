package imds

import (
	"net/netip"
	"slices"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
)

// Redirected returns the Destinations of a proxy on this node. A connection counts as redirected if
// its original destination is one of these:
//
//   - 169.254.169.254 or fd00:ec2::254, port 80
//   - configured, port 80, if it is a valid address and not a loopback address
//   - the metadata service's address in the record of the source's attachment
//   - the proxy's own address, if that record has the datapath "pod": the rule is then inside the pod's
//     network namespace, and the node's kernel knows no other destination
//
// Any other connection was made to the proxy itself.
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
