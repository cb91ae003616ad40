package main

import (
	"context"
	"errors"
	"io/fs"

	"github.com/containernetworking/cni/pkg/skel"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/netconf"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/redirect"
)

// del removes what is on record for the attachment; the network namespace, prevResult and most of the configuration are
// not looked at, because by now they may be gone, or wrong.
//
// Any error of a DEL stops the chain, and the plugins before this one never release the pod's interface and address. So
// the only error is that of a lock which another process held for too long: the runtime will try again. What cannot be
// removed for another reason stays on record, and can do no harm: the rule needs the host interface that goes with the
// pod, or its successor's own address on it.
func (p *plugin) del(args *skel.CmdArgs) error {
	err := p.detach(context.Background(), netconf.StateDir(args.StdinData), args.ContainerID, args.IfName)
	if passing(err) {
		return coded(err, codeRules)
	}
	if err != nil {
		p.log.Error("attachment could not be torn down; it stays on record", "attachment",
			attachment.ID(args.ContainerID, args.IfName), "error", err)
	}
	return nil
}

// detach removes an attachment's rules and then its record. Nothing to remove is no error.
func (p *plugin) detach(ctx context.Context, stateDir, containerID, ifName string) error {
	if attachment.Valid(containerID, ifName) != nil {
		return nil // no ADD has taken it
	}
	iptables, dir := p.iptables(stateDir), attachment.In(stateDir)
	record, err := dir.Get(containerID, ifName)
	if err == nil {
		return p.tearDown(ctx, iptables, dir, record)
	}
	if !errors.Is(err, fs.ErrNotExist) {
		p.log.Warn("record cannot be read; removing rules by their comment", "attachment", attachment.ID(containerID, ifName),
			"error", err)
	}
	if err := iptables.RemoveLeftovers(attachment.ID(containerID, ifName)); err != nil {
		return err
	}
	return dir.Delete(ctx, containerID, ifName)
}

// tearDown removes the rules before the record: without it they would be hard to find.
func (p *plugin) tearDown(ctx context.Context, iptables *redirect.Node, dir attachment.Dir, record *attachment.Record) error {
	if err := iptables.Remove(redirect.Form(record.Backend), rulesOf(record)); err != nil {
		return err
	}
	return dir.Delete(ctx, record.ContainerID, record.IfName)
}
