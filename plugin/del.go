package main

import (
	"context"

	"github.com/containernetworking/cni/pkg/skel"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/netconf"
)

// del removes the rules and the record of the attachment. It reads neither the network namespace
// nor prevResult, which may no longer exist, and only the state directory of the configuration.
//
// An error of DEL stops the chain, so the plugins before this one would not release the pod's
// interface and address. del therefore fails only if a lock is busy, because the runtime then tries
// again. After another failure the record stays, and the agent removes the rest. A rule that stays
// is harmless: it matches only the pod's host interface, which the runtime removes, together with
// the pod's address.
func (p *plugin) del(args *skel.CmdArgs) error {
	n := p.node(&netconf.Config{StateDir: netconf.StateDir(args.StdinData)})
	defer n.Close()
	err := n.Detach(context.Background(), args.ContainerID, args.IfName)
	if isTemporary(err) {
		return toCNIError(err, codeRules)
	}
	if err != nil {
		p.log.Error("attachment could not be torn down; it stays on record", "attachment",
			attachment.ID(args.ContainerID, args.IfName), "error", err)
	}
	return nil
}
