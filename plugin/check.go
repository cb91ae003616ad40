package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/skel"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/hostlink"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/netconf"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/redirect"
)

// check compares the record with the pod's interface and prevResult, and the rules with the record. It changes nothing,
// and its error lists all that is wrong.
func (p *plugin) check(args *skel.CmdArgs) error {
	conf, err := netconf.Parse(args.StdinData)
	if err != nil {
		return err
	}
	record, err := attachment.In(conf.StateDir).Get(args.ContainerID, args.IfName)
	if errors.Is(err, fs.ErrNotExist) {
		return cniError(codeCheck, "", "attachment %s: no record", attachment.ID(args.ContainerID, args.IfName))
	}
	if err != nil {
		return coded(err, codeState)
	}
	link, ips, err := p.look(conf, args)
	if err != nil {
		return err
	}
	wrong := differences(record, link, ips)
	iptables, err := p.iptables(conf.StateDir).IPTables(redirect.Form(record.Backend))
	if err != nil {
		return coded(err, codeCheck)
	}
	missing, err := iptables.Missing(p.baseOf(record, conf, iptables.Has), rulesOf(record))
	if err != nil {
		return coded(err, codeCheck)
	}
	for _, what := range missing {
		wrong = append(wrong, "no "+what)
	}
	if len(wrong) > 0 {
		return cniError(codeCheck, "", "attachment %s: %s", record.ID(), strings.Join(wrong, "; "))
	}
	return nil
}

func differences(record *attachment.Record, link *hostlink.Link, ips []netip.Addr) []string {
	var wrong []string
	now := attachment.HostLink{Name: link.Name, Index: link.Index, Bridge: link.Bridge}
	if now != record.HostLink {
		wrong = append(wrong, fmt.Sprintf("host interface is %+v, recorded is %+v", now, record.HostLink))
	}
	for _, ip := range ips {
		if !slices.Contains(record.IPs, ip) {
			wrong = append(wrong, fmt.Sprintf("%s is not on record", ip))
		}
	}
	for _, ip := range record.IPs {
		if !slices.Contains(ips, ip) {
			wrong = append(wrong, fmt.Sprintf("%s is on record, and the interface or prevResult does not have it", ip))
		}
	}
	return wrong
}
