package rules

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
)

// rule is one rule and its chain.
type rule struct {
	object, table, chain string
	spec                 []string
}

// guardRules returns the guard of a service. The filter table answers TCP with a reset, so an SDK
// sees a closed port; CNI plugins and runtimes insert ACCEPT rules above it at any time. mangle's
// POSTROUTING comes after it. It drops every protocol but UDP over IPv4 (family.drop), and passes
// the host's own packets.
func guardRules(service netip.Addr) []rule {
	address := []string{"-d", prefix(service)}
	all := address
	if service.Is4() {
		all = append(slices.Clone(address), "!", "-p", "udp")
	}
	answers := append([]string{"-s"}, all[1:]...) // guardForward has the reason
	return []rule{
		{"guard in filter FORWARD", "filter", "FORWARD",
			slices.Concat(address, []string{"-p", "tcp"}, comment(NodeOwner), []string{"-j", "REJECT", "--reject-with", "tcp-reset"})},
		{"guard in mangle POSTROUTING", "mangle", "POSTROUTING",
			slices.Concat(all, []string{"-m", "addrtype", "!", "--src-type", "LOCAL"}, comment(NodeOwner), []string{"-j", "DROP"})},
		{"guard in mangle FORWARD", "mangle", "FORWARD", slices.Concat(answers, comment(NodeOwner), []string{"-j", "DROP"})},
	}
}

func jumpRule(service netip.AddrPort) rule {
	return rule{"jump to " + IPTablesChain, "nat", "PREROUTING", slices.Concat(toService(service), comment(NodeOwner), []string{"-j", IPTablesChain})}
}

// redirectRules returns the rules of records in the chain.
func redirectRules(f *family, records []*attachment.Record) []rule {
	var rules []rule
	for _, r := range records {
		for _, redirect := range r.Redirects {
			if familyOf(redirect.Source) != f {
				continue
			}
			link := []string{"-i", r.HostLink.Name}
			if r.Datapath == attachment.DatapathBridged {
				link = []string{"-m", "physdev", "--physdev-in", r.HostLink.Name}
			}
			rules = append(rules, rule{
				fmt.Sprintf("redirection of %s to %s", redirect.Source, redirect.Proxy), "nat", IPTablesChain,
				slices.Concat([]string{"-s", prefix(redirect.Source)}, link, toService(redirect.Metadata), comment(r.ID()),
					[]string{"-j", "DNAT", "--to-destination", redirect.Proxy.String()}),
			})
		}
	}
	return rules
}

func toService(service netip.AddrPort) []string {
	return []string{"-d", prefix(service.Addr()), "-p", "tcp", "-m", "tcp", "--dport", strconv.Itoa(int(service.Port()))}
}

func comment(owner string) []string { return []string{"-m", "comment", "--comment", owner} }

func prefix(ip netip.Addr) string { return netip.PrefixFrom(ip, ip.BitLen()).String() }

func commentOf(spec []string) string {
	if i := slices.Index(spec, "--comment"); i >= 0 && i+1 < len(spec) {
		return spec[i+1]
	}
	return ""
}

// sameRule compares rules by their sorted words, because iptables lists options in another order.
// Each word of these rules can belong to one option only.
func sameRule(a, b []string) bool {
	return slices.Equal(slices.Sorted(slices.Values(a)), slices.Sorted(slices.Values(b)))
}
