package main

import (
	"context"
	"strings"

	"github.com/containernetworking/cni/pkg/skel"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/netconf"
)

// check compares the record with the pod's interface and prevResult, and the rules with the record.
// Its error lists all differences. It changes nothing.
func (p *plugin) check(args *skel.CmdArgs) error {
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
	wrong, err := n.Check(context.Background(), req)
	if err != nil {
		return toCNIError(err, codeCheck)
	}
	if len(wrong) > 0 {
		return cniError(codeCheck, "", "attachment %s: %s", attachment.ID(args.ContainerID, args.IfName), strings.Join(wrong, "; "))
	}
	return nil
}
