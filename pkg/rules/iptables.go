package rules

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	goiptables "github.com/coreos/go-iptables/iptables"
	"github.com/google/nftables"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/nft"
)

// The iptables backend serves kernels without nftables and nodes with "backend": "iptables". It uses
// the node's own iptables and ip6tables commands. Compared with nftables:
//
//   - It binds no address to a bridge port: a bridged neighbour with NET_RAW can send requests with a
//     pod's source address only through its own port, which the redirection does not match, but can draw
//     the pod's answers to itself by ARP or NDP.
//   - The jump to its chain is inserted first, and not kept there: a rule that another program inserts
//     above it later, or a NAT chain of an earlier priority, can take metadata requests. These then
//     meet the guard or that program's destination, and the pod has no credentials.
//   - A change is one command for each rule, not one transaction. The guard comes before the jump, and
//     the jump before a pod's rule.

// IPTablesChain holds the redirections, in the nat table.
const IPTablesChain = "KUBE2IAM-CNI"

// lockSeconds bounds the wait for the xtables lock.
const lockSeconds = 5

// lockExitStatus is iptables' exit status when it could not get the lock (xtables.h, RESOURCE_PROBLEM).
const lockExitStatus = 4

// iptables is the node's iptables commands.
type iptables struct {
	dirs   []string
	opened map[*family]*goiptables.IPTables
}

// rule is one rule and its chain.
type rule struct {
	object, table, chain string
	spec                 []string
}

// makeGuard makes the guard on a kernel without nftables. A node without ip6tables has none for IPv6.
func (t *iptables) makeGuard(ctx context.Context, n *Node, dryRun bool) ([]Change, error) {
	var changes []Change
	for _, service := range n.services() {
		ipt, err := t.open(ctx, n, familyOf(service.Addr()))
		if errors.Is(err, ErrNoIPTables) && service.Addr().Is6() {
			n.logUnguarded(service.Addr(), err)
			continue
		}
		if err != nil {
			return changes, err
		}
		c := &iptablesChanges{ctx: ctx, IPTables: ipt, dryRun: dryRun}
		for _, r := range guardRules(service.Addr()) {
			if err == nil {
				err = c.insertIfMissing(r)
			}
		}
		changes = append(changes, c.made...)
		if err != nil {
			return changes, err
		}
	}
	return changes, nil
}

// redirect makes the redirections of records, and removes those that owns selects and no record has.
// owns can be nil.
func (t *iptables) redirect(ctx context.Context, n *Node, records []*attachment.Record, owns func(string) bool, dryRun bool) ([]Change, error) {
	var changes []Change
	for _, f := range []*family{ipv4, ipv6} {
		wanted := redirectRules(f, records)
		if len(wanted) == 0 && owns == nil {
			continue // an IPv4 pod needs no ip6tables
		}
		ipt, err := t.open(ctx, n, f)
		if errors.Is(err, ErrNoIPTables) && len(wanted) == 0 {
			continue
		}
		if err != nil {
			return changes, err
		}
		c := &iptablesChanges{ctx: ctx, IPTables: ipt, dryRun: dryRun}
		err = c.redirect(wanted, redirectedServices(records, f), owns)
		changes = append(changes, c.made...)
		if err != nil {
			return changes, err
		}
	}
	return changes, nil
}

// iptablesChanges makes changes with the command of one family, or only notes them with dryRun.
type iptablesChanges struct {
	*goiptables.IPTables
	ctx    context.Context
	dryRun bool
	made   []Change
}

func (c *iptablesChanges) make(kind nft.Kind, object string, do func() error) error {
	c.made = append(c.made, Change{Kind: kind, Object: object + " (iptables)"})
	if err := c.ctx.Err(); err != nil || c.dryRun {
		return err
	}
	return wrapIPTables(object, do())
}

// insertIfMissing inserts a rule as the first of its chain, unless the chain has it. iptables-nft
// cannot read past another program's rule that it cannot parse; a rule below such a one counts as
// missing.
func (c *iptablesChanges) insertIfMissing(r rule) error {
	exists, err := c.Exists(r.table, r.chain, r.spec...)
	exit, isExit := errors.AsType[*goiptables.Error](err)
	if isExit && (exit.IsNotExist() || strings.Contains(exit.Error(), "Parsing nftables rule failed")) {
		exists, err = false, nil
	}
	if err != nil {
		return wrapIPTables(r.object, err)
	}
	if exists {
		return nil
	}
	return c.make(nft.Missing, r.object, func() error { return c.Insert(r.table, r.chain, 1, r.spec...) })
}

// redirect makes the chain and the jumps to it if a redirection is wanted, and then the redirections.
func (c *iptablesChanges) redirect(wanted []rule, services []netip.AddrPort, owns func(string) bool) error {
	hasChain, err := c.ChainExists("nat", IPTablesChain)
	if err != nil {
		return wrapIPTables("chain "+IPTablesChain, err)
	}
	if len(wanted) > 0 && !hasChain {
		if err := c.make(nft.Missing, "chain "+IPTablesChain, c.newChainIfMissing); err != nil {
			return err
		}
	}
	for _, service := range services {
		if err := c.insertIfMissing(jumpRule(service)); err != nil {
			return err
		}
	}
	var found [][]string
	if hasChain {
		if found, err = c.listRedirections(); err != nil {
			return err
		}
	}
	for _, spec := range found {
		isWanted := slices.ContainsFunc(wanted, func(r rule) bool { return sameRule(r.spec, spec) })
		if owner := commentOf(spec); isWanted || owns == nil || !owns(owner) {
			continue
		}
		err := c.make(nft.Stale, "redirection of "+commentOf(spec), func() error { return c.DeleteIfExists("nat", IPTablesChain, spec...) })
		if err != nil {
			return err
		}
	}
	for _, r := range wanted {
		if slices.ContainsFunc(found, func(spec []string) bool { return sameRule(r.spec, spec) }) {
			continue
		}
		if err := c.make(nft.Missing, r.object, func() error { return c.Append(r.table, r.chain, r.spec...) }); err != nil {
			return err
		}
	}
	return nil
}

func (c *iptablesChanges) listRedirections() ([][]string, error) {
	lines, err := c.List("nat", IPTablesChain)
	if err != nil {
		return nil, wrapIPTables("chain "+IPTablesChain, err)
	}
	var found [][]string
	for _, line := range lines {
		if spec, ok := strings.CutPrefix(line, "-A "+IPTablesChain+" "); ok {
			found = append(found, strings.Fields(strings.ReplaceAll(spec, `"`, "")))
		}
	}
	return found, nil
}

// newChainIfMissing creates the chain. Two ADDs can race to do so.
func (c *iptablesChanges) newChainIfMissing() error {
	err := c.NewChain("nat", IPTablesChain)
	if exists, failed := c.ChainExists("nat", IPTablesChain); err != nil && failed == nil && exists {
		return nil
	}
	return err
}

// guardRules returns the guard of a service. The filter table answers TCP with a reset, so an SDK sees
// a closed port; CNI plugins and runtimes insert ACCEPT rules above it at any time. mangle's POSTROUTING
// comes after it. It drops every protocol but UDP over IPv4 (family.drop), and passes the host's own
// packets.
func guardRules(service netip.Addr) []rule {
	address := []string{"-d", prefix(service)}
	all := address
	if service.Is4() {
		all = append(slices.Clone(address), "!", "-p", "udp")
	}
	return []rule{
		{"guard in filter FORWARD", "filter", "FORWARD",
			slices.Concat(address, []string{"-p", "tcp"}, comment(NodeOwner), []string{"-j", "REJECT", "--reject-with", "tcp-reset"})},
		{"guard in mangle POSTROUTING", "mangle", "POSTROUTING",
			slices.Concat(all, []string{"-m", "addrtype", "!", "--src-type", "LOCAL"}, comment(NodeOwner), []string{"-j", "DROP"})},
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

// sameRule compares rules whose options iptables lists in an order of its own. No word of these rules
// is an option's in one place and another's in another.
func sameRule(a, b []string) bool {
	return slices.Equal(slices.Sorted(slices.Values(a)), slices.Sorted(slices.Values(b)))
}

// uninstall removes the rules and the chain. Chains of iptables itself stay.
func (t *iptables) uninstall(ctx context.Context, n *Node) error {
	var errs []error
	for _, f := range []*family{ipv4, ipv6} {
		ipt, err := t.open(ctx, n, f)
		if errors.Is(err, ErrNoIPTables) {
			continue
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		for _, at := range [][2]string{{"nat", "PREROUTING"}, {"filter", "FORWARD"}, {"mangle", "POSTROUTING"}} {
			lines, err := ipt.List(at[0], at[1])
			if err != nil {
				errs = append(errs, wrapIPTables("chain "+at[1], err))
				continue
			}
			for _, line := range lines {
				spec := strings.Fields(strings.ReplaceAll(line, `"`, ""))
				if len(spec) > 2 && commentOf(spec) == NodeOwner {
					errs = append(errs, wrapIPTables(line, ipt.DeleteIfExists(at[0], at[1], spec[2:]...)))
				}
			}
		}
		if exists, err := ipt.ChainExists("nat", IPTablesChain); err != nil || exists {
			errs = append(errs, wrapIPTables("chain "+IPTablesChain, errors.Join(err, ipt.ClearAndDeleteChain("nat", IPTablesChain))))
		}
	}
	return errors.Join(errs...)
}

// open returns the command of a family. It runs the command once to learn its version.
func (t *iptables) open(ctx context.Context, n *Node, f *family) (*goiptables.IPTables, error) {
	if ipt := t.opened[f]; ipt != nil {
		return ipt, nil
	}
	path, err := t.find(ctx, n, f)
	if err != nil {
		return nil, err
	}
	protocol := goiptables.ProtocolIPv4
	if f == ipv6 {
		protocol = goiptables.ProtocolIPv6
	}
	ipt, err := goiptables.New(goiptables.Path(path), goiptables.IPFamily(protocol), goiptables.Timeout(lockSeconds))
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrNoIPTables, path, err)
	}
	if t.opened == nil {
		t.opened = make(map[*family]*goiptables.IPTables)
	}
	t.opened[f] = ipt
	return ipt, nil
}

// find returns the path of the node's command. On a kernel without nftables it prefers the one that is
// named for its legacy form: the plain name may be the other form's, which cannot work there.
func (t *iptables) find(ctx context.Context, n *Node, f *family) (string, error) {
	names := []string{"iptables"}
	if f == ipv6 {
		names = []string{"ip6tables"}
	}
	if errors.Is(n.checkSupported(ctx), ErrUnsupported) {
		names = []string{names[0] + "-legacy", names[0]}
	}
	for _, name := range names {
		for _, dir := range t.dirs {
			path := filepath.Join(dir, name)
			if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
				return path, nil
			}
		}
	}
	return "", fmt.Errorf("%w: %s in none of %s", ErrNoIPTables, names[0], strings.Join(t.dirs, ":"))
}

// isUsed reports whether rules of this backend can be on the node, without running a command: the
// legacy command would make the tables that it is asked for, and each packet would pass them.
func (t *iptables) isUsed(n *Node) bool {
	if conn, err := n.nft(); err == nil {
		for _, family := range []nftables.TableFamily{nftables.TableFamilyIPv4, nftables.TableFamilyIPv6} {
			if conn.HasChain(family, "nat", IPTablesChain) {
				return true
			}
		}
	}
	for _, list := range []string{"/proc/thread-self/net/ip_tables_names", "/proc/thread-self/net/ip6_tables_names"} {
		f, err := os.Open(list)
		if err != nil {
			if !errors.Is(err, fs.ErrNotExist) {
				return true
			}
			continue
		}
		defer f.Close()
		for lines := bufio.NewScanner(f); lines.Scan(); {
			if lines.Text() == "nat" || lines.Text() == "mangle" {
				return true
			}
		}
	}
	return false
}

// IPTablesDirs returns the directories of PATH and those where distributions put iptables: a runtime's
// PATH does not always have them.
func IPTablesDirs() []string {
	var dirs []string
	for _, dir := range append(filepath.SplitList(os.Getenv("PATH")), "/usr/sbin", "/sbin", "/usr/local/sbin", "/usr/bin", "/bin") {
		if filepath.IsAbs(dir) && !slices.Contains(dirs, dir) {
			dirs = append(dirs, dir)
		}
	}
	return dirs
}

// wrapIPTables says what a command was for, and gives an error that can pass its meaning.
func wrapIPTables(object string, err error) error {
	if err == nil {
		return nil
	}
	if exit, isExit := errors.AsType[*goiptables.Error](err); isExit && exit.ExitStatus() == lockExitStatus {
		return fmt.Errorf("%s: %w: %w", object, ErrBusy, err)
	}
	return fmt.Errorf("%s: %w", object, err)
}
