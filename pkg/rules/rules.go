// Package rules keeps the node's packet filter rules: the redirection of each pod's metadata
// requests to the proxy, the binding of bridged pods' addresses to their ports, and the guard that
// refuses metadata requests that are not redirected.
//
// The desired rules are pure functions of attachment records and the node's settings:
// redirection.go, binding.go and guard.go for the host, pod.go for datapath "pod",
// iptables_rules.go for the fallback. Node makes them with package nft or with the node's iptables
// command.
package rules

import (
	"errors"
	"net/netip"
	"slices"
	"strings"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/nft"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/podnetns"
)

// Table is the name of the nftables tables, one in each family.
const Table = "kube2iam-cni"

// NodeOwner is the owner of elements that belong to the node. Those of an attachment have its ID.
const NodeOwner = "kube2iam-cni"

// Errors that callers tell apart. ErrBusy and ErrUnsupported are also those of the iptables
// backend.
var (
	ErrBusy        = nft.ErrBusy
	ErrUnsupported = nft.ErrUnsupported
	// ErrNoIPTables is the error of a node without the iptables command that is needed.
	ErrNoIPTables = errors.New("no iptables command")
	// ErrHostNetns is the error of a path that leads to the host's network namespace instead of a
	// pod's.
	ErrHostNetns = podnetns.ErrHost
)

// Change is one difference between the kernel's rules and the desired ones.
type Change = nft.Change

// Settings configure the rules of a node.
type Settings struct {
	// MetadataIP is the IPv4 address of the metadata service. The IPv6 address is fixed.
	MetadataIP netip.Addr
	// IPv6 says that the kernel has IPv6, so that the guard covers it.
	IPv6  bool
	Guard bool
	// Mark is the mark of bridged packets between the bridge and the redirection, one bit or several.
	Mark uint32
}

// services returns the metadata services of the node.
func (s Settings) services() []netip.AddrPort {
	services := []netip.AddrPort{netip.AddrPortFrom(s.MetadataIP, attachment.MetadataPort)}
	if s.IPv6 {
		services = append(services, netip.AddrPortFrom(attachment.MetadataIPv6, attachment.MetadataPort))
	}
	return services
}

// allServices returns the node's metadata services and those of the records.
func (n *Node) allServices(records []*attachment.Record) []netip.AddrPort {
	services := n.services()
	for _, r := range records {
		for _, redirect := range r.Redirects {
			if !slices.Contains(services, redirect.Metadata) {
				services = append(services, redirect.Metadata)
			}
		}
	}
	return services
}

// redirectedServices returns the metadata services of one family that records redirect.
func redirectedServices(records []*attachment.Record, f *family) []netip.AddrPort {
	var services []netip.AddrPort
	for _, r := range records {
		for _, redirect := range r.Redirects {
			if familyOf(redirect.Source) == f && !slices.Contains(services, redirect.Metadata) {
				services = append(services, redirect.Metadata)
			}
		}
	}
	return services
}

// hostRecords returns the records whose redirections are rules of the host.
func hostRecords(records ...*attachment.Record) []*attachment.Record {
	return slices.DeleteFunc(slices.Clone(records), func(r *attachment.Record) bool { return r.Datapath == attachment.DatapathPod })
}

func elementsOf(r *attachment.Record) []nft.Element {
	if r == nil {
		return nil
	}
	return append(redirectElements(r), bindingElements(r)...)
}

// isAttachment reports whether an owner is an attachment's ID.
func isAttachment(owner string) bool { return strings.Contains(owner, "@") }

// recordOwner selects the rules of a record, or none if it is nil.
func recordOwner(r *attachment.Record) func(string) bool {
	if r == nil {
		return nil
	}
	return func(owner string) bool { return owner == r.ID() }
}
