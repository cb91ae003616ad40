package main

import (
	"context"

	"github.com/containernetworking/cni/pkg/skel"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/netconf"
)

// del removes what is on record for the attachment; the network namespace, prevResult and most of the configuration are
// not looked at, because by now they may be gone, or wrong.
//
// Any error of a DEL stops the chain, and the plugins before this one never release the pod's interface and address. So
// the only error is that of a lock which another process held for too long: the runtime will try again. What cannot be
// removed for another reason stays on record, and can do no harm: the rule needs the host interface that goes with the
// pod, or its successor's own address on it.
func (p *plugin) del(args *skel.CmdArgs) error {
	n := p.node(&netconf.Config{StateDir: netconf.StateDir(args.StdinData)})
	defer n.Close()
	err := n.Detach(context.Background(), args.ContainerID, args.IfName)
	if passing(err) {
		return coded(err, codeRules)
	}
	if err != nil {
		p.log.Error("attachment could not be torn down; it stays on record", "attachment",
			attachment.ID(args.ContainerID, args.IfName), "error", err)
	}
	return nil
}
