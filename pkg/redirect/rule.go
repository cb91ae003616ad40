package redirect

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Chain holds the redirections. It is in the nat table, for each family and each form of iptables.
const Chain = "KUBE2IAM-CNI"

// Comment marks the rules of the base as ours.
const Comment = "kube2iam-cni"

// rule is one rule of iptables and its place. Rules of the base are inserted at position 1: what stands above one of them could
// take its packets. The jump is kept there (precedence.go).
type rule struct {
	what  string // for errors
	table string
	chain string
	spec  []string
}

func (r rule) String() string { return r.what }

func (a Attachment) rule(r Redirection) rule {
	return rule{
		what:  r.String(),
		table: "nat",
		chain: Chain,
		spec: slices.Concat([]string{"-s", host(r.Source)}, a.enters(), to(r.Metadata),
			[]string{"-m", "comment", "--comment", a.ID, "-j", "DNAT", "--to-destination", r.Proxy.String()}),
	}
}

// rules are those of the attachment's redirections of one service.
func (a Attachment) rules(metadata netip.AddrPort) []rule {
	var rules []rule
	for _, r := range a.redirects(metadata) {
		rules = append(rules, a.rule(r))
	}
	return rules
}

func (a Attachment) enters() []string {
	switch {
	case a.Mark != 0:
		// As the save commands write it, which leave a full mask out.
		return []string{"-m", "mark", "--mark", strings.TrimSuffix(fmt.Sprintf("0x%x/0x%x", a.Mark, a.Mark), "/0xffffffff")}
	case a.Bridged:
		return []string{"-m", "physdev", "--physdev-in", a.HostLink}
	}
	return []string{"-i", a.HostLink}
}

func jump(metadata netip.AddrPort, chain string) rule {
	return rule{
		what:  "jump to " + chain,
		table: "nat",
		chain: "PREROUTING",
		spec:  slices.Concat(to(metadata), ours(), []string{"-j", chain}),
	}
}

// refusal answers at once, so that an SDK sees a closed port and not its timeout. It alone is not enough: CNI plugins and
// container runtimes insert ACCEPT rules above it at any time.
func refusal(metadata netip.AddrPort) rule {
	return rule{
		what:  "guard in filter FORWARD",
		table: "filter",
		chain: "FORWARD",
		spec:  slices.Concat([]string{"-d", host(metadata.Addr()), "-p", "tcp"}, ours(), []string{"-j", "REJECT", "--reject-with", "tcp-reset"}),
	}
}

// backstop is the guard itself: no verdict of the filter table is the last one before it, because mangle's POSTROUTING is
// passed after. Packets that the host itself sends have a local source there; to forge one from a pod fails in the routing
// before, and its answer would go to the host. (In mangle's FORWARD no such distinction would be needed, but that is passed
// before filter's, and REJECT exists in filter only: the quick refusal would be lost.)
//
// It drops every protocol, as family.refuse does: UDP over IPv4 passes.
func backstop(metadata netip.AddrPort) rule {
	refused := []string{"-d", host(metadata.Addr())}
	if metadata.Addr().Is4() {
		refused = append(refused, "!", "-p", "udp")
	}
	return rule{
		what:  "guard in mangle POSTROUTING",
		table: "mangle",
		chain: "POSTROUTING",
		spec:  slices.Concat(refused, []string{"-m", "addrtype", "!", "--src-type", "LOCAL"}, ours(), []string{"-j", "DROP"}),
	}
}

// baseRules are those that an attachment's redirections of a service rely on, in the order in which they are to appear.
func baseRules(metadata netip.AddrPort, guard, redirected bool) []rule {
	var rules []rule
	if guard {
		rules = append(rules, refusal(metadata), backstop(metadata))
	}
	if redirected {
		rules = append(rules, jump(metadata, Chain))
	}
	return rules
}

func to(metadata netip.AddrPort) []string {
	return []string{"-d", host(metadata.Addr()), "-p", "tcp", "-m", "tcp", "--dport", strconv.Itoa(int(metadata.Port()))}
}

func ours() []string { return []string{"-m", "comment", "--comment", Comment} }

func host(ip netip.Addr) string { return netip.PrefixFrom(ip, ip.BitLen()).String() }
