package main

import (
	"context"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/netconf"
)

// add attaches the pod and prints prevResult. If it fails, it leaves neither a rule nor a record of
// the attachment.
func (p *plugin) add(args *skel.CmdArgs) error {
	ctx := context.Background()
	conf, err := netconf.Parse(args.StdinData)
	if err != nil {
		return err
	}
	req, err := request(conf, args)
	if err != nil {
		return err
	}
	n := p.node(conf)
	defer n.Close()
	record, err := n.Attach(ctx, req)
	if err != nil {
		return toCNIError(err, codeState)
	}
	if err := p.print(conf); err != nil {
		if err := n.Detach(ctx, record.ContainerID, record.IfName); err != nil {
			p.log.Error("failed ADD could not be undone", "attachment", record.ID(), "error", err)
		}
		return toCNIError(err, types.ErrIOFailure)
	}
	return nil
}

// print prints prevResult, in the version of the configuration.
func (p *plugin) print(conf *netconf.Config) error {
	result, err := conf.PrevResult.GetAsVersion(conf.CNIVersion)
	if err != nil {
		return err
	}
	return result.PrintTo(p.stdout)
}
