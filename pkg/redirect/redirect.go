// Package redirect keeps the rules that send a pod's metadata requests to the proxy, and the guard that refuses those of
// everybody else.
//
// For each attachment there is one rule per address, in one chain of the nat table whose name never changes, so that it is
// found whatever version or configuration made it. A rule matches the attachment's own host side and its own source
// address, and carries the attachment's identity as comment.
//
// For the node there is the base: the chain, a jump to it, and the guard; where nothing is redirected, the guard alone. What is not redirected is forwarded with the
// metadata address still as destination, and the guard refuses that; the host's own traffic is not forwarded, and a
// redirected packet has another destination by then.
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

// Redirection sends what Source sends to Metadata to Proxy instead. All three are of one family.
type Redirection struct {
	Source          netip.Addr
	Metadata, Proxy netip.AddrPort
}

// Attachment is what is wanted for one interface of one container.
type Attachment struct {
	// ID is the attachment's identity. It holds no white space and no quotes.
	ID string
	// HostLink is the interface on the host by which the packets enter; Bridged says that it is the port of a bridge, where
	// the IP layer sees the bridge instead, and only bridge-nf tells the port.
	HostLink     string
	Bridged      bool
	Redirections []Redirection
}

// Base is what is wanted of the node before any attachment's rule is added.
type Base struct {
	// Metadata are the services that pods must not reach, one of a family at most. The chain and the jump are wanted for
	// those of them that the attachment has a redirection of.
	Metadata []netip.AddrPort
	// Guard tells whether the guard is wanted. It is never removed.
	Guard bool
}

// rule is one rule and its place. Rules of the base have position 1: what stands above one of them could take its packets.
type rule struct {
	what  string // for errors
	table string
	chain string
	spec  []string
}

func (r rule) String() string { return r.what }

func (a Attachment) rule(r Redirection) rule {
	return rule{
		what:  fmt.Sprintf("redirection of %s to %s", r.Source, r.Proxy),
		table: "nat",
		chain: Chain,
		spec: slices.Concat([]string{"-s", host(r.Source)}, a.enters(), to(r.Metadata),
			[]string{"-m", "comment", "--comment", a.ID, "-j", "DNAT", "--to-destination", r.Proxy.String()}),
	}
}

// rules are those of the attachment's redirections of one service.
func (a Attachment) rules(metadata netip.AddrPort) []rule {
	var rules []rule
	for _, r := range a.Redirections {
		if r.Metadata == metadata {
			rules = append(rules, a.rule(r))
		}
	}
	return rules
}

func (a Attachment) enters() []string {
	if a.Bridged {
		return []string{"-m", "physdev", "--physdev-in", a.HostLink}
	}
	return []string{"-i", a.HostLink}
}

// validate refuses what iptables would read as something else.
func (a Attachment) validate() error {
	if a.HostLink == "" || strings.HasSuffix(a.HostLink, "+") || strings.HasPrefix(a.HostLink, "-") || strings.HasPrefix(a.HostLink, "!") {
		// "cali+" is a name that Linux allows, and to iptables it is every interface that begins with "cali".
		return fmt.Errorf("host interface %q: a name that iptables takes for a pattern or an option", a.HostLink)
	}
	if a.ID == "" || len(a.ID) > 255 || strings.ContainsAny(a.ID, " \t\n\"'\\") {
		return fmt.Errorf("attachment %q: not an identity of 1 to 255 plain bytes", a.ID)
	}
	return nil
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
		spec:  slices.Concat(to(metadata), ours(), []string{"-j", "REJECT", "--reject-with", "tcp-reset"}),
	}
}

// backstop is the guard itself: no verdict of the filter table is the last one before it, because mangle's POSTROUTING is
// passed after. Packets that the host itself sends have a local source there; to forge one from a pod fails in the routing
// before, and its answer would go to the host. (In mangle's FORWARD no such distinction would be needed, but that is passed
// before filter's, and REJECT exists in filter only: the quick refusal would be lost.)
func backstop(metadata netip.AddrPort) rule {
	return rule{
		what:  "guard in mangle POSTROUTING",
		table: "mangle",
		chain: "POSTROUTING",
		spec:  slices.Concat(to(metadata), []string{"-m", "addrtype", "!", "--src-type", "LOCAL"}, ours(), []string{"-j", "DROP"}),
	}
}

func to(metadata netip.AddrPort) []string {
	return []string{"-d", host(metadata.Addr()), "-p", "tcp", "-m", "tcp", "--dport", strconv.Itoa(int(metadata.Port()))}
}

func ours() []string { return []string{"-m", "comment", "--comment", Comment} }

func host(ip netip.Addr) string { return netip.PrefixFrom(ip, ip.BitLen()).String() }
