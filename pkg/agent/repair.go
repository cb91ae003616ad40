package agent

import (
	"context"
	"errors"
	"net/netip"
	"slices"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/rules"
)

// snapshot is the records of one round and what is known of their pods.
type snapshot struct {
	*attachment.Snapshot
	links map[int]string
	// live are the records whose pods exist, gone the others.
	live, gone []*attachment.Record
	// attached are the records that exist after the repair.
	attached []*attachment.Record
}

// repair makes records and rules agree with each other and with the host. It returns the last
// snapshot, or nil if the records are unknown, and the changes of rules. A node without a backend
// for new attachments keeps the rules that it has.
func (a *Agent) repair(ctx context.Context) (*snapshot, []rules.Change, error) {
	backend, noBackend := a.node.Rules.ChooseBackend(ctx, a.node.Backend)
	s, err := a.snapshot(nil)
	if err != nil {
		return nil, nil, errors.Join(noBackend, err)
	}
	changes, err := a.node.Rules.Reconcile(ctx, s.live, backend, true)
	if err == nil && len(changes) == 0 && len(s.gone) == 0 && len(s.Repairs) == 0 {
		return s, nil, noBackend
	}
	unlock, err := a.node.Records.LockExclusive(ctx)
	if err != nil {
		return s, nil, errors.Join(noBackend, err)
	}
	defer unlock()
	locked, err := a.snapshot(s)
	if err != nil {
		return s, nil, errors.Join(noBackend, err)
	}
	err = locked.Repair()
	a.logChanges("repaired the state directory", locked.Repairs)
	err = errors.Join(noBackend, err, a.collect(locked))
	changes, failed := a.node.Rules.Reconcile(ctx, locked.live, backend, false)
	a.logChanges("repaired the node's rules", texts(changes))
	return locked, changes, errors.Join(err, failed)
}

// snapshot reads the records and finds out which pods are gone. With before, an earlier snapshot,
// it does not enter pods but uses that snapshot's result, for a caller that holds the exclusive
// lock.
func (a *Agent) snapshot(before *snapshot) (*snapshot, error) {
	records, err := a.node.Records.Read()
	if err != nil {
		return nil, err
	}
	if records.Invalid != nil {
		// No pod is served by such a record, and its rules are removed.
		a.log.Warn("records that cannot be read", "error", records.Invalid)
	}
	links, err := a.Links()
	if err != nil {
		return nil, err
	}
	s := &snapshot{Snapshot: records, links: links, attached: records.Records}
	for _, r := range records.Records {
		isGone := false
		switch {
		case r.HostLink.Index != 0:
			isGone = links[r.HostLink.Index] != r.HostLink.Name
		case before != nil:
			isGone = before.wasGone(r)
		default:
			ips, err := a.Addresses(r.Netns, r.IfName)
			if err != nil {
				a.log.Warn("It is unknown whether the pod of an attachment exists; the attachment stays.", "attachment", r.ID(), "error", err)
			}
			isGone = err == nil && !containsAny(ips, r.IPs)
		}
		if isGone {
			s.gone = append(s.gone, r)
		} else {
			s.live = append(s.live, r)
		}
	}
	return s, nil
}

// wasGone reports whether the pod of that very record was gone. An older result is safe here. A pod
// that was gone returns only with an ADD, which writes another record (Created). One that has gone
// since is collected in the next round. A pod that removes its own address for a moment harms only
// itself.
func (s *snapshot) wasGone(r *attachment.Record) bool {
	return slices.ContainsFunc(s.gone, func(g *attachment.Record) bool { return g.ID() == r.ID() && g.Created.Equal(r.Created) })
}

func containsAny(ips, any []netip.Addr) bool {
	return slices.ContainsFunc(any, func(ip netip.Addr) bool { return slices.Contains(ips, ip) })
}

// collect deletes the records of attachments that are gone. Reconcile then removes their rules in
// one transaction, as rules without a record. If the agent is killed in between, the next round
// does so.
func (a *Agent) collect(s *snapshot) error {
	var errs []error
	for _, r := range s.gone {
		a.log.Info("collecting an attachment that is gone", "attachment", r.ID(), "namespace", r.Pod.Namespace, "pod", r.Pod.Name)
		wait := a.node.DestroySocketsOfRemoved(r)
		errs = append(errs, a.node.Records.Delete(r.ContainerID, r.IfName))
		wait()
	}
	s.attached = s.live
	return errors.Join(errs...)
}

// repairInPods makes the missing redirections inside pods, and removes those of attachments that
// are gone. Its duration depends on the pods, within bounds. So it comes after the guard, and no
// lock is held.
func (a *Agent) repairInPods(ctx context.Context, s *snapshot) {
	var errs []error
	for _, r := range s.gone {
		if r.Datapath == attachment.DatapathPod {
			a.node.Rules.DetachPod(ctx, r) // an error is harmless
		}
	}
	for _, r := range s.live {
		if r.Datapath != attachment.DatapathPod {
			continue
		}
		changes, err := a.node.Rules.CheckPod(ctx, r)
		if err == nil && len(changes) > 0 {
			a.log.Info("repairing a redirection inside a pod", "attachment", r.ID(), "namespace", r.Pod.Namespace, "pod", r.Pod.Name)
			err = a.attachPod(ctx, r)
		}
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		a.log.Warn("redirections inside pods cannot be made or removed", "error", err)
	}
}
