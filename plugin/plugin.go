package main

import (
	"io"
	"log/slog"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attach"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/netconf"
)

// plugin is the CNI callbacks.
type plugin struct {
	attach.System
	stdout io.Writer
	log    *slog.Logger // on standard error, which runtimes log
}

// node returns this node with a configuration.
func (p *plugin) node(c *netconf.Config) *attach.Node {
	return attach.New(attach.SettingsOf(c), p.System, p.log)
}

// request returns the validated request of a runtime.
func request(conf *netconf.Config, args *skel.CmdArgs) (attach.Request, error) {
	if err := attachment.ValidateID(args.ContainerID, args.IfName); err != nil {
		return attach.Request{}, cniError(types.ErrInvalidEnvironmentVariables, "", "%v", err)
	}
	pod, err := netconf.ParsePod(args.Args)
	if err != nil {
		return attach.Request{}, err
	}
	if conf.PrevResult == nil {
		return attach.Request{}, cniError(types.ErrInvalidNetworkConfig, "chain kube2iam-cni after the plugin that makes the interface",
			"prevResult is missing")
	}
	ips, err := attach.ResultIPs(conf.PrevResult)
	if err != nil {
		return attach.Request{}, cniError(types.ErrDecodingFailure, "", "prevResult: %v", err)
	}
	return attach.Request{
		ContainerID: args.ContainerID, IfName: args.IfName, Netns: args.Netns, Network: conf.Name, Pod: pod, IPs: ips,
	}, nil
}
