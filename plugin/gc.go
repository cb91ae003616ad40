package main

import (
	"context"
	"slices"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/netconf"
)

// gc tears down the attachments of the network that the runtime does not list as valid. It goes on after an error, and
// returns all of them.
func (p *plugin) gc(args *skel.CmdArgs) error {
	conf, err := netconf.Parse(args.StdinData)
	if err != nil {
		return err
	}
	if conf.Valid == nil {
		// To take a missing list for an empty one would tear down every pod of the node.
		return cniError(types.ErrInvalidNetworkConfig, "", "cni.dev/valid-attachments is missing")
	}
	n := p.node(conf)
	defer n.Close()
	return coded(n.DetachAll(context.Background(), func(r *attachment.Record) bool {
		return r.Network == conf.Name && !slices.Contains(conf.Valid, types.GCAttachment{ContainerID: r.ContainerID, IfName: r.IfName})
	}), codeGC)
}
