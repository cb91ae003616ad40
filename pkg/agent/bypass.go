package agent

import (
	"context"
	"errors"
	"maps"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
)

// checkBypass finds links that got a filter before netfilter after their ADD, as from the daemon
// of an eBPF datapath that attaches its program when it learns of a pod. It sends one packet for
// each such link and logs if netfilter does not see it. It changes nothing: silence proves nothing,
// and the host's rules stay.
func (a *Agent) checkBypass(ctx context.Context, s *snapshot) error {
	candidates, err := a.BypassCandidates(s.links)
	if err != nil {
		return err
	}
	maps.DeleteFunc(a.probed, func(index int, _ bool) bool { return !candidates[index] })
	var errs []error
	for _, r := range s.live {
		if r.Datapath == attachment.DatapathPod || !candidates[r.HostLink.Index] || a.probed[r.HostLink.Index] {
			continue
		}
		passes, err := a.node.PassesNetfilter(ctx, r.Netns, r.IPs[0])
		if err != nil {
			errs = append(errs, err)
			continue
		}
		a.probed[r.HostLink.Index] = true // once for a link, whatever the result
		if !passes {
			a.log.Warn("A filter comes before netfilter, which did not see a packet that was sent to find out: if the filter bypasses netfilter, no guard protects the node's role from this pod. Nothing was changed.",
				"attachment", r.ID(), "namespace", r.Pod.Namespace, "pod", r.Pod.Name, "host interface", r.HostLink.Name)
		}
	}
	return errors.Join(errs...)
}
