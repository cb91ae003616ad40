package main

import (
	"cmp"
	"io"
	"log/slog"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/netconf"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/node"
)

// plugin is the CNI callbacks.
type plugin struct {
	node.System
	stdout io.Writer
	log    *slog.Logger // on standard error, which runtimes log
}

// node is this node, as a configuration has it.
func (p *plugin) node(c *netconf.Config) *node.Node { return node.New(settings(c), p.System, p.log) }

func settings(c *netconf.Config) node.Settings {
	return node.Settings{
		ProxyIP: c.ProxyIP, ProxyPort: c.ProxyPort, MetadataIP: c.MetadataIP, StateDir: c.StateDir,
		Backend: cmp.Or(string(c.Backend), "auto"), Guard: c.Guard, Mark: c.Mark, InPod: c.Datapath == attachment.DatapathPod,
	}
}

// request is what a runtime asks for, checked as far as its words go.
func request(conf *netconf.Config, args *skel.CmdArgs) (node.Request, error) {
	if err := attachment.Valid(args.ContainerID, args.IfName); err != nil {
		return node.Request{}, cniError(types.ErrInvalidEnvironmentVariables, "", "%v", err)
	}
	pod, err := netconf.ParsePod(args.Args)
	if err != nil {
		return node.Request{}, err
	}
	if conf.PrevResult == nil {
		return node.Request{}, cniError(types.ErrInvalidNetworkConfig, "chain kube2iam-cni after the plugin that makes the interface",
			"prevResult is missing")
	}
	ips, err := node.ResultIPs(conf.PrevResult)
	if err != nil {
		return node.Request{}, cniError(types.ErrDecodingFailure, "", "prevResult: %v", err)
	}
	return node.Request{
		ContainerID: args.ContainerID, IfName: args.IfName, Netns: args.Netns, Network: conf.Name, Pod: pod, IPs: ips,
	}, nil
}
