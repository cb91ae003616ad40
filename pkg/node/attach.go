package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/redirect"
)

// Attach records who holds the container's addresses, and redirects them. It needs nothing but the node's kernel and file
// system. After an error there is neither a rule nor a record of the attachment; the error is an *Error.
//
// The record is written before the rules that it lists: whoever is killed in between leaves a record by which a later ADD,
// DEL or round of the agent finds what stands.
func (n *Node) Attach(ctx context.Context, r Request) (*attachment.Record, error) {
	p, err := n.prepare(r)
	if err != nil {
		return nil, err
	}
	unlock, err := n.shared(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	return p.Record, n.attach(ctx, p)
}

// prepared is an attachment that is planned, and not made.
type prepared struct {
	*plan
	program func(context.Context) error // makes the rules on the host
}

// prepare looks, and changes nothing. It takes no lock: it may wait for the pod.
func (n *Node) prepare(r Request) (*prepared, error) {
	p, err := n.plan(r)
	if err != nil {
		return nil, err
	}
	prog, err := n.program(p)
	if err != nil {
		return nil, err
	}
	return &prepared{p, prog}, nil
}

// program returns what makes a plan's rules on the host, checked as far as that goes without changing anything.
func (n *Node) program(p *plan) (func(context.Context) error, error) {
	if p.Datapath == attachment.DatapathPod {
		p.Backend = attachment.BackendNFTables
		base := n.base(p.Record)
		return func(context.Context) error { return n.rules.Guard(base) }, nil
	}
	chosen, err := n.rules.Choose(n.Backend)
	if err != nil {
		return nil, about(Rules, err)
	}
	if err := p.choose(n, chosen); err != nil {
		return nil, err
	}
	base := n.base(p.Record)
	if err := chosen.Open(base, RulesOf(p.Record)); err != nil {
		return nil, about(Rules, err)
	}
	return func(ctx context.Context) error {
		err := chosen.Add(ctx, base, RulesOf(p.Record))
		if p.Mark != 0 && errors.Is(err, redirect.ErrUnsupported) {
			return &Error{Bridge, fmt.Errorf("%s is a port of the bridge %s, bridge-nf is off, and no mark can be set at the port: %w",
				p.HostLink.Name, p.HostLink.Bridge, err)}
		}
		return err
	}, nil
}

// attach makes the attachment of a container that has not started. The caller holds the shared lock.
func (n *Node) attach(ctx context.Context, p *prepared) error {
	if err := n.putRecord(ctx, p.Record); err != nil {
		return err
	}
	wait := n.destroySockets(p.Record)
	err := about(Rules, p.program(ctx))
	if err == nil {
		err = n.redirectInPod(p.Record)
	}
	if failed := wait(); err == nil {
		err = about(State, failed)
	}
	if err != nil {
		// What cannot be removed stays on record, for the DEL that the runtime sends after a failed ADD.
		if err := n.tearDown(ctx, p.Record); err != nil {
			n.Log.Error("failed ADD could not be undone", "attachment", p.ID(), "error", err)
		}
		return err
	}
	return n.stillMine(ctx, p.Record)
}

// attachRunning makes the attachment of a running pod, except for the redirection inside the pod (redirectInPod): the caller holds
// the exclusive lock, and no pod may decide how long. It destroys no socket of the pod, also after an error: the agent tries
// again in each round. After an error there is neither a rule nor a record of the attachment.
func (n *Node) attachRunning(ctx context.Context, p *prepared) error {
	if err := n.putRecord(ctx, p.Record); err != nil {
		return err
	}
	err := about(Rules, p.program(ctx))
	if err == nil {
		return nil
	}
	var undone error
	if p.Datapath != attachment.DatapathPod {
		undone = n.remove(p.Record)
	}
	if undone == nil {
		undone = n.records().Delete(ctx, p.ContainerID, p.IfName)
	}
	if undone != nil {
		n.Log.Error("failed attachment could not be undone", "attachment", p.ID(), "error", undone)
	}
	return err
}

// redirectInPod makes the redirection inside the pod, if the record has it there. How long this takes depends on the pod, within
// bounds, so no caller holds the exclusive lock.
func (n *Node) redirectInPod(r *attachment.Record) error {
	if r.Datapath != attachment.DatapathPod {
		return nil
	}
	return about(Rules, n.addInPod(RulesOf(r)))
}

// putRecord writes the record, after removing what stands in its way.
func (n *Node) putRecord(ctx context.Context, r *attachment.Record) error {
	if err := n.supersede(ctx, r); err != nil {
		return err
	}
	return about(State, n.records().Put(ctx, r))
}

// stillMine undoes an ADD whose address went to another one while its rules were made: the record says whose an address is,
// and the rules must not say otherwise. An address has one holder, so this takes a network that gives one to two.
func (n *Node) stillMine(ctx context.Context, record *attachment.Record) error {
	for _, ip := range record.IPs {
		holder, err := n.records().Holder(ip)
		if err == nil && holder.ID() == record.ID() {
			continue
		}
		if err == nil {
			err = fmt.Errorf("address %s was given to %s in the meantime", ip, holder.ID())
		}
		return about(State, errors.Join(err, n.tearDown(ctx, record)))
	}
	return nil
}

// supersede removes the rules that an earlier ADD of the attachment made, and tears down other attachments that are on
// record with one of its addresses: an address has one holder, so their DEL never came.
func (n *Node) supersede(ctx context.Context, record *attachment.Record) error {
	earlier, err := n.records().Get(record.ContainerID, record.IfName)
	switch {
	case err == nil:
		err = n.remove(earlier)
	case errors.Is(err, fs.ErrNotExist):
		err = nil
	default:
		n.Log.Warn("record cannot be read; removing rules by their comment", "attachment", record.ID(), "error", err)
		err = n.rules.RemoveLeftovers(record.ID())
	}
	if err != nil {
		return about(Rules, err)
	}
	for _, ip := range record.IPs {
		holder, err := n.records().Holder(ip)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			// Put takes the address away from it. Its rule matches this address only, and another interface.
			n.Log.Warn("record of the address's former holder cannot be read", "ip", ip, "error", err)
			continue
		}
		if holder.ID() == record.ID() {
			continue
		}
		n.Log.Warn("address is reused without a DEL; tearing its former holder down", "ip", ip, "holder", holder.ID(),
			"namespace", holder.Pod.Namespace, "pod", holder.Pod.Name)
		if err := n.tearDown(ctx, holder); err != nil {
			return about(Rules, err)
		}
	}
	return nil
}

// Detach removes an attachment's rules and then its record. Nothing to remove is no error.
func (n *Node) Detach(ctx context.Context, containerID, ifName string) error {
	if attachment.Valid(containerID, ifName) != nil {
		return nil // no ADD has taken it
	}
	if !n.stateless() {
		switch unlock, err := n.shared(ctx); {
		case err == nil:
			defer unlock()
		case !errors.Is(err, fs.ErrNotExist): // which an uninstall in this moment would have made so
			return err
		}
	}
	record, err := n.records().Get(containerID, ifName)
	if err == nil {
		return n.tearDown(ctx, record)
	}
	id := attachment.ID(containerID, ifName)
	if !errors.Is(err, fs.ErrNotExist) {
		n.Log.Warn("record cannot be read; removing rules by their comment", "attachment", id, "error", err)
	}
	if err := n.rules.RemoveLeftovers(id); err != nil {
		return err
	}
	return n.records().Delete(ctx, containerID, ifName)
}

// DetachAll detaches the attachments that gone says are. It goes on after an error, and returns all of them.
func (n *Node) DetachAll(ctx context.Context, gone func(*attachment.Record) bool) error {
	if n.stateless() {
		return nil
	}
	unlock, err := n.shared(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	records, err := n.records().List()
	errs := []error{err}
	for _, record := range records {
		if gone(record) {
			errs = append(errs, n.tearDown(ctx, record))
		}
	}
	return errors.Join(errs...)
}

// tearDown removes the rules before the record: without it they would be hard to find.
func (n *Node) tearDown(ctx context.Context, record *attachment.Record) error {
	defer n.destroySocketsOfRemoved(record)()
	if err := n.remove(record); err != nil {
		return err
	}
	return n.records().Delete(ctx, record.ContainerID, record.IfName)
}

func (n *Node) remove(record *attachment.Record) error {
	return n.rules.Remove(redirect.Form(record.Backend), RulesOf(record))
}
