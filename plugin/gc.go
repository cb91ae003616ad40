package main

import (
	"context"
	"errors"
	"slices"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/netconf"
)

// gc tears down the attachments of the network that the runtime does not list as valid. It goes on after an error, and
// returns all of them.
func (p *plugin) gc(args *skel.CmdArgs) error {
	ctx := context.Background()
	conf, err := netconf.Parse(args.StdinData)
	if err != nil {
		return err
	}
	if conf.Valid == nil {
		// To take a missing list for an empty one would tear down every pod of the node.
		return cniError(types.ErrInvalidNetworkConfig, "", "cni.dev/valid-attachments is missing")
	}
	iptables, dir := p.iptables(conf.StateDir), attachment.In(conf.StateDir)
	records, err := dir.List()
	errs := []error{err}
	for _, record := range records {
		valid := types.GCAttachment{ContainerID: record.ContainerID, IfName: record.IfName}
		if record.Network == conf.Name && !slices.Contains(conf.Valid, valid) {
			errs = append(errs, p.tearDown(ctx, iptables, dir, record))
		}
	}
	return coded(errors.Join(errs...), codeGC)
}
