package main

import (
	"context"
	"errors"
	"io/fs"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/netconf"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/redirect"
)

// add records who holds the pod's addresses, redirects them, and returns the previous result. It needs nothing but the
// node's kernel and file system. After an error there is neither a rule nor a record of the attachment.
func (p *plugin) add(args *skel.CmdArgs) error {
	ctx := context.Background()
	conf, err := netconf.Parse(args.StdinData)
	if err != nil {
		return err
	}
	record, err := p.plan(conf, args)
	if err != nil {
		return err
	}
	if err := p.attach(ctx, conf, record); err != nil {
		return err
	}
	if err := p.print(conf); err != nil {
		p.rollBack(ctx, conf.StateDir, record)
		return coded(err, types.ErrIOFailure)
	}
	return nil
}

// attach writes the record, and then programs the rules that it lists: whoever is killed in between leaves a record by
// which a later ADD, DEL or GC finds what stands.
func (p *plugin) attach(ctx context.Context, conf *netconf.Config, record *attachment.Record) error {
	iptables, dir := p.iptables(conf.StateDir), attachment.In(conf.StateDir)
	chosen, err := iptables.Choose(string(conf.Backend))
	if err != nil {
		return coded(err, codeState)
	}
	base := p.baseOf(record, conf, chosen.Has)
	// Before the record is written: what fails here leaves nothing to undo.
	if err := chosen.Open(base, rulesOf(record)); err != nil {
		return coded(err, codeRules)
	}
	record.Backend = string(chosen.Form())
	if err := p.supersede(ctx, iptables, dir, record); err != nil {
		return err
	}
	if err := dir.Put(ctx, record); err != nil {
		return coded(err, codeState)
	}
	if err := chosen.Add(ctx, base, rulesOf(record)); err != nil {
		p.rollBack(ctx, conf.StateDir, record)
		return coded(err, codeRules)
	}
	return nil
}

// supersede removes the rules that an earlier ADD of the attachment made, and tears down other attachments that are on
// record with one of its addresses: an address has one holder, so their DEL never came.
func (p *plugin) supersede(ctx context.Context, iptables *redirect.Node, dir attachment.Dir, record *attachment.Record) error {
	earlier, err := dir.Get(record.ContainerID, record.IfName)
	switch {
	case err == nil:
		err = iptables.Remove(redirect.Form(earlier.Backend), rulesOf(earlier))
	case errors.Is(err, fs.ErrNotExist):
		err = nil
	default:
		p.log.Warn("record cannot be read; removing rules by their comment", "attachment", record.ID(), "error", err)
		err = iptables.RemoveLeftovers(record.ID())
	}
	if err != nil {
		return coded(err, codeRules)
	}
	for _, ip := range record.IPs {
		holder, err := dir.Holder(ip)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			// Put takes the address away from it. Its rule matches this address only, and another interface.
			p.log.Warn("record of the address's former holder cannot be read", "ip", ip, "error", err)
			continue
		}
		if holder.ID() == record.ID() {
			continue
		}
		p.log.Warn("address is reused without a DEL; tearing its former holder down", "ip", ip, "holder", holder.ID(),
			"namespace", holder.Pod.Namespace, "pod", holder.Pod.Name)
		if err := p.tearDown(ctx, iptables, dir, holder); err != nil {
			return coded(err, codeRules)
		}
	}
	return nil
}

// rollBack undoes an ADD. What it cannot remove stays on record, for the DEL that the runtime sends after a failed ADD.
func (p *plugin) rollBack(ctx context.Context, stateDir string, record *attachment.Record) {
	if err := p.tearDown(ctx, p.iptables(stateDir), attachment.In(stateDir), record); err != nil {
		p.log.Error("failed ADD could not be undone", "attachment", record.ID(), "error", err)
	}
}

// print writes the previous result as it came, in the version of the configuration.
func (p *plugin) print(conf *netconf.Config) error {
	result, err := conf.PrevResult.GetAsVersion(conf.CNIVersion)
	if err != nil {
		return err
	}
	return result.PrintTo(p.stdout)
}
