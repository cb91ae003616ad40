package node

import (
	"context"
	"errors"
	"maps"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/hostlink"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/redirect"
)

// recheck looks for filters that came before netfilter after the ADD, as those of a datapath do whose daemon attaches them
// when it learns of a pod. What such a filter does with packets is found out once for each link; a pod whose packets it takes
// past netfilter is attached anew, inside.
func (a *Agent) recheck(ctx context.Context) error {
	links, err := a.Links()
	if err != nil {
		return err
	}
	filtered, err := a.Filtered(links)
	if err != nil || len(filtered) == 0 {
		return err
	}
	maps.DeleteFunc(a.passes, func(index int, _ bool) bool { return !filtered[index] })
	if a.passes == nil {
		a.passes = make(map[int]bool)
	}
	records, _ := a.records().List() // what cannot be read, repair has said
	var errs []error
	for _, r := range records {
		if r.Path == attachment.PathNetns || !filtered[r.HostLink.Index] || a.passes[r.HostLink.Index] || links[r.HostLink.Index] != r.HostLink.Name {
			continue
		}
		seen, err := a.seen(ctx, r)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if seen {
			a.passes[r.HostLink.Index] = true
			continue
		}
		a.Log.Warn("a filter has come that takes a pod's packets past netfilter; attaching it anew", "attachment", r.ID(),
			"namespace", r.Pod.Namespace, "pod", r.Pod.Name, "host interface", r.HostLink.Name)
		_, err = a.Attach(ctx, requestOf(r))
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// requestOf is what a record was made of.
func requestOf(r *attachment.Record) Request {
	return Request{ContainerID: r.ContainerID, IfName: r.IfName, Netns: r.Netns, Network: r.Network, Pod: r.Pod, IPs: r.IPs}
}

// outdated attaches anew the pods of bridges whose rules of iptables match what is no longer there: another mark than is set
// by now, or a port that bridge-nf no longer tells.
func (a *Agent) outdated(ctx context.Context) error {
	records, _ := a.records().List()
	seen := make(map[string]hostlink.BridgeNF)
	var errs []error
	for _, r := range records {
		if r.Path != attachment.PathBridged || redirect.Form(r.Backend) == redirect.NFTables {
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
		_, err := a.Attach(ctx, requestOf(r))
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// seen sends a packet of the pod's. The lock keeps a later repair from taking the probe for one whose process died.
func (n *Node) seen(ctx context.Context, r *attachment.Record) (bool, error) {
	unlock, err := n.shared(ctx)
	if err != nil {
		return false, err
	}
	defer unlock()
	return n.rules.Seen(r.Netns, r.IPs[0], n.metadataFor(r.IPs[0]))
}
