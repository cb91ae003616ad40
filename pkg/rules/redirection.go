package rules

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/nft"
)

// A redirection translates the destination of a pod's metadata requests to the proxy. It matches
// the pod's host link and the pod's own source address. The rules never change: each pod is an
// element of a map, so a packet's way is as long with one pod as with a thousand.

// redirectPriority comes before the destination NAT of other programs (-100): the first chain that
// translates a connection decides. clearMarkPriority comes directly after destination NAT, and
// before routing: no routing rule (ip rule fwmark) sees the mark.
const (
	redirectPriority  = -110
	clearMarkPriority = -99
)

func (f *family) ipTable() *nftables.Table { return &nftables.Table{Name: Table, Family: f.table} }

// metadataSet has the metadata services whose connections are redirected. routedMap has the proxy
// by host link and source address, bridgedMap by source address.
func (f *family) metadataSet() *nftables.Set {
	return newSet(f.ipTable(), "metadata", f.socketType(), true)
}
func (f *family) routedMap() *nftables.Set {
	return newMap(f.ipTable(), "routed", f.linkAddrType(), f.socketType(), true)
}
func (f *family) bridgedMap() *nftables.Set {
	return newMap(f.ipTable(), "bridged", f.addrType, f.socketType(), false)
}

// redirection returns the chains that redirect, for the families of the records' redirects, and the
// metadata services of these.
func (s Settings) redirection(records []*attachment.Record) nft.Ruleset {
	var rs nft.Ruleset
	for _, f := range []*family{ipv4, ipv6} {
		services := redirectedServices(records, f)
		if len(services) == 0 {
			continue
		}
		t, metadata := f.ipTable(), f.metadataSet()
		toMetadata := f.matchDestination(metadata)
		linkAndSource := []expr.Any{&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: register0}, f.loadAddr(f.saddr, register(nameRegisters))}
		source := f.loadAddr(f.saddr, register0)
		rs.Tables = append(rs.Tables, nft.Table{
			Table: t, Sets: []*nftables.Set{metadata, f.routedMap(), f.bridgedMap()},
			Chains: []nft.Chain{
				newChain(t, "redirections", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, redirectPriority,
					nft.Rule{Comment: "routed pods", Exprs: slices.Concat(toMetadata, f.translate(f.routedMap(), linkAndSource...))},
					nft.Rule{Comment: fmt.Sprintf("bridged pods, mark %#x", s.Mark),
						Exprs: slices.Concat(toMetadata, matchMark(s.Mark), f.translate(f.bridgedMap(), source))}),
				newChain(t, "clear-mark", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, clearMarkPriority,
					nft.Rule{Comment: fmt.Sprintf("mark %#x", s.Mark), Exprs: append(matchMark(s.Mark), clearMark(s.Mark)...)}),
			},
		})
		rs.Elements = append(rs.Elements, serviceElements(services, f, metadata)...)
	}
	for _, r := range records {
		rs.Elements = append(rs.Elements, redirectElements(r)...)
	}
	return rs
}

// serviceElements returns the family's services as elements of a set.
func serviceElements(services []netip.AddrPort, f *family, set *nftables.Set) []nft.Element {
	var elements []nft.Element
	for _, service := range services {
		if familyOf(service.Addr()) == f {
			elements = append(elements, nft.Element{Set: set, Key: socketBytes(service), Owner: NodeOwner, Object: service.String()})
		}
	}
	return elements
}

func redirectElements(r *attachment.Record) []nft.Element {
	var elements []nft.Element
	for _, redirect := range r.Redirects {
		f := familyOf(redirect.Source)
		e := nft.Element{Value: socketBytes(redirect.Proxy), Owner: r.ID(), Object: fmt.Sprintf("redirection of %s to %s", redirect.Source, redirect.Proxy)}
		switch r.Datapath {
		case attachment.DatapathRouted:
			e.Set, e.Key = f.routedMap(), linkAddrBytes(r.HostLink.Name, redirect.Source)
		case attachment.DatapathBridged:
			e.Set, e.Key = f.bridgedMap(), addrBytes(redirect.Source)
		default:
			continue
		}
		elements = append(elements, e)
	}
	return elements
}
