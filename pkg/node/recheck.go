package node

import (
	"context"
	"errors"
	"io/fs"
	"maps"
	"net/netip"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/hostlink"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/redirect"
)

// recheck looks for filters that came before netfilter after the ADD, as those of a datapath do whose daemon attaches them
// when it learns of a pod. Whether netfilter sees packets behind it is asked once for each link, and said where it does not. No
// more is done: silence proves nothing (behindFilter), and the host's rules stay.
func (a *Agent) recheck(ctx context.Context) error {
	links, err := a.Links()
	if err != nil {
		return err
	}
	filtered, err := a.Filtered(links)
	if err != nil || len(filtered) == 0 {
		return err
	}
	maps.DeleteFunc(a.probed, func(index int, _ bool) bool { return !filtered[index] })
	if a.probed == nil {
		a.probed = make(map[int]bool)
	}
	records, _ := a.records().List() // what cannot be read, repair has said
	var errs []error
	for _, r := range records {
		if r.Datapath == attachment.DatapathPod || !filtered[r.HostLink.Index] || a.probed[r.HostLink.Index] || links[r.HostLink.Index] != r.HostLink.Name {
			continue
		}
		seen, err := a.seen(ctx, r.Netns, r.IPs[0])
		if err != nil {
			errs = append(errs, err)
			continue
		}
		a.probed[r.HostLink.Index] = true // asked, whatever it was: once for a link, not in each round
		if !seen {
			a.Log.Warn("a filter comes before netfilter, which did not see a packet that was sent to find out: if it takes them past, no guard protects the node's role from this pod; nothing was changed",
				"attachment", r.ID(), "namespace", r.Pod.Namespace, "pod", r.Pod.Name, "host interface", r.HostLink.Name)
		}
	}
	return errors.Join(errs...)
}

// reattach attaches a pod anew that is on record. Where that fails the record is put back, so that the next round tries again:
// no runtime will. A record that has gone or changed meanwhile is left alone, and so is a pod whose interface is another now. If the
// redirection is to be inside the pod now, repairInPods makes it later in the round.
func (a *Agent) reattach(ctx context.Context, r *attachment.Record) error {
	p, err := a.prepare(Request{
		ContainerID: r.ContainerID, IfName: r.IfName, Netns: r.Netns, Network: r.Network, Pod: r.Pod, IPs: r.IPs,
	})
	if err != nil {
		return err
	}
	unlock, err := a.exclusive(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	now, err := a.records().Get(r.ContainerID, r.IfName)
	if err != nil || !now.Created.Equal(r.Created) || p.HostLink != r.HostLink || a.stands(r) != nil {
		return nil
	}
	err = a.attachRunning(ctx, p)
	if err == nil {
		return nil
	}
	if _, there := a.records().Get(r.ContainerID, r.IfName); errors.Is(there, fs.ErrNotExist) {
		err = errors.Join(err, a.records().Put(ctx, r))
	}
	return err
}

// outdated attaches anew the pods of bridges whose rules of iptables match what is no longer there: another mark than is set
// by now, or a port that bridge-nf no longer tells.
func (a *Agent) outdated(ctx context.Context) error {
	records, _ := a.records().List()
	seen := make(map[string]hostlink.BridgeNF)
	var errs []error
	for _, r := range records {
		if r.Datapath != attachment.DatapathBridged || redirect.Form(r.Backend) == redirect.NFTables {
			continue
		}
		nf, asked := seen[r.HostLink.Bridge]
		if !asked {
			var err error
			if nf, err = a.BridgeNF(r.HostLink.Bridge); err != nil {
				continue // the bridge is gone, and its pods with it
			}
			seen[r.HostLink.Bridge] = nf
		}
		if marked := r.Mark != 0; marked && r.Mark == a.Mark || !marked && portsSeen(r, nf) {
			continue
		}
		a.Log.Info("attaching a pod anew: its rule matches what is no longer there", "attachment", r.ID(), "namespace", r.Pod.Namespace, "pod", r.Pod.Name)
		errs = append(errs, a.reattach(ctx, r))
	}
	return errors.Join(errs...)
}

// seen sends a packet of the pod's. The lock keeps a later repair from taking the probe for one whose process died.
func (n *Node) seen(ctx context.Context, netns string, ip netip.Addr) (bool, error) {
	unlock, err := n.shared(ctx)
	if err != nil {
		return false, err
	}
	defer unlock()
	return n.rules.Seen(netns, ip, n.metadataFor(ip))
}
