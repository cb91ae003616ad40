package node

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/hostlink"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/redirect"
)

// Check compares the record with the container's interface and addresses, and the rules with the record. It changes nothing,
// and lists all that is wrong. An error means that this could not be found out.
func (n *Node) Check(r Request) ([]string, error) {
	record, err := n.records().Get(r.ContainerID, r.IfName)
	if errors.Is(err, fs.ErrNotExist) {
		return []string{"no record"}, nil
	}
	if err != nil {
		return nil, about(State, err)
	}
	link, path, err := n.look(r)
	if err != nil {
		return nil, err
	}
	ips, err := own(r.IPs, link.IPs)
	if err != nil {
		return nil, &Error{Addresses, fmt.Errorf("interface %s: %w", r.IfName, err)}
	}
	wrong := differences(record, link, path, ips)
	missing, err := n.missing(record)
	if err != nil {
		return nil, about(Rules, err)
	}
	for _, what := range missing {
		wrong = append(wrong, "no "+what)
	}
	return wrong, nil
}

func (n *Node) missing(record *attachment.Record) ([]string, error) {
	if record.Datapath == attachment.DatapathPod {
		guard, err := n.rules.MissingGuard(n.base(record))
		if err != nil {
			return nil, err
		}
		missing, err := n.rules.MissingInPod(RulesOf(record))
		return append(guard, missing...), err
	}
	b, err := n.rules.Backend(redirect.Form(record.Backend))
	if err != nil {
		return nil, err
	}
	return b.Missing(n.base(record), RulesOf(record))
}

func differences(record *attachment.Record, link *hostlink.Link, path attachment.Datapath, ips []netip.Addr) []string {
	var wrong []string
	now := attachment.HostLink{Name: link.Name, Index: link.Index, Bridge: link.Bridge}
	if now != record.HostLink || path != record.Datapath {
		wrong = append(wrong, fmt.Sprintf("host interface is %+v (%s), recorded is %+v (%s)", now, path, record.HostLink, record.Datapath))
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

// Usable tells whether an Attach could succeed, as far as that shows without running and without making anything.
func (n *Node) Usable() error {
	if _, err := n.rules.Choose(n.Backend); err != nil {
		return err
	}
	if n.ProxyIP.IsValid() {
		return nil
	}
	_, err4 := n.NodeIP(hostlink.IPv4)
	_, err6 := n.NodeIP(hostlink.IPv6)
	if err4 != nil && err6 != nil {
		return fmt.Errorf("proxyIP: %w; %w", err4, err6)
	}
	return nil
}
