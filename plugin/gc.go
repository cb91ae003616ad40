package main

import (
	"context"
	"slices"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/netconf"
)

// gc removes the attachments of the network that the runtime does not list as valid. It continues
// after an error, and returns all errors.
func (p *plugin) gc(args *skel.CmdArgs) error {
	conf, err := netconf.Parse(args.StdinData)
	if err != nil {
		return err
	}
	if conf.Valid == nil {
		// With a missing list as an empty one, GC would remove the attachments of all pods.
		return cniError(types.ErrInvalidNetworkConfig, "", "cni.dev/valid-attachments is missing")
	}
	n := p.node(conf)
	defer n.Close()
	return toCNIError(n.DetachAll(context.Background(), func(r *attachment.Record) bool {
		return r.Network == conf.Name && !slices.Contains(conf.Valid, types.GCAttachment{ContainerID: r.ContainerID, IfName: r.IfName})
	}), codeGC)
}
