package attach

import (
	"context"
	"errors"
	"io/fs"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
)

// Detach removes an attachment's rules and then its record. A missing attachment is no error.
func (n *Node) Detach(ctx context.Context, containerID, ifName string) error {
	if attachment.ValidateID(containerID, ifName) != nil {
		return nil // ADD has refused it
	}
	unlock, err := n.Records.LockDelete(ctx, containerID, ifName)
	switch {
	case err == nil:
		r, err := n.Records.Get(containerID, ifName)
		if err == nil {
			defer unlock()
			return n.tearDown(ctx, r)
		}
		if !errors.Is(err, fs.ErrNotExist) {
			unlock()
			n.log.Warn("record cannot be read; removing rules by their owner", "attachment", attachment.ID(containerID, ifName), "error", err)
			return n.detachWithoutRecord(ctx, containerID, ifName)
		}
		err = n.Records.Delete(containerID, ifName) // what a killed ADD or DEL left of the record
		unlock()
		if err != nil {
			return wrap(KindState, err)
		}
	case !errors.Is(err, fs.ErrNotExist): // without a state directory no process changes anything
		return wrap(KindState, err)
	}
	// A runtime repeats DELs, so most attachments without a record have no rules either.
	rules, err := n.Rules.DetachID(ctx, attachment.ID(containerID, ifName), true)
	if err != nil || len(rules) == 0 {
		return err
	}
	return n.detachWithoutRecord(ctx, containerID, ifName)
}

// detachWithoutRecord removes the rules that have the attachment as their owner, and an unreadable
// record. It excludes all ADDs: without the record's addresses it cannot lock those alone, and an
// ADD could take over an element between its read and its removal.
func (n *Node) detachWithoutRecord(ctx context.Context, containerID, ifName string) error {
	unlock, err := n.Records.LockExclusive(ctx)
	if err != nil {
		return wrap(KindState, err)
	}
	defer unlock()
	if _, err := n.Rules.DetachID(ctx, attachment.ID(containerID, ifName), false); err != nil {
		return err
	}
	return n.Records.Delete(containerID, ifName)
}

// DetachAll detaches the attachments that isGone selects. It continues after an error and returns
// all.
func (n *Node) DetachAll(ctx context.Context, isGone func(*attachment.Record) bool) error {
	records, err := n.Records.List()
	errs := []error{err}
	for _, r := range records {
		if isGone(r) {
			errs = append(errs, n.Detach(ctx, r.ContainerID, r.IfName))
		}
	}
	return errors.Join(errs...)
}

// tearDown removes the rules before the record: without it they are hard to find. The caller holds
// the attachment's locks.
func (n *Node) tearDown(ctx context.Context, r *attachment.Record) error {
	defer n.DestroySocketsOfRemoved(r)()
	if err := n.Rules.Detach(ctx, r); err != nil {
		return err
	}
	if r.Datapath == attachment.DatapathPod {
		n.Rules.DetachPod(ctx, r) // rules that the pod keeps concern no other pod and end with its namespace
	}
	return n.Records.Delete(r.ContainerID, r.IfName)
}
