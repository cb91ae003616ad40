package rules

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"

	goiptables "github.com/coreos/go-iptables/iptables"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/nft"
)

// The iptables backend serves kernels without nftables and nodes with "backend": "iptables". It
// uses the node's own iptables and ip6tables commands. Compared with nftables:
//
//   - It binds no address to a bridge port: a bridged neighbour with NET_RAW can send requests with
//     a pod's source address only through its own port, which the redirection does not match, but
//     can draw the pod's answers to itself by ARP or NDP.
//   - The jump to its chain is inserted first, and not kept there: a rule that another program
//     inserts above it later, or a NAT chain of an earlier priority, can take metadata requests.
//     These then meet the guard or that program's destination, and the pod has no credentials.
//   - A change is one command for each rule, not one transaction. The guard comes before the jump,
//     and the jump before a pod's rule.

// IPTablesChain holds the redirections, in the nat table.
const IPTablesChain = "KUBE2IAM-CNI"

// iptables is the node's iptables commands.
type iptables struct {
	dirs   []string
	opened map[*family]*goiptables.IPTables
}

// makeGuard makes the guard on a kernel without nftables. A node without ip6tables has none for
// IPv6.
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

// redirect makes the redirections of records, and removes those that owns selects and no record
// has. owns can be nil.
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

// redirect makes the chain and the jumps to it if a redirection is wanted, and then the
// redirections.
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
		if found, err = listRules(c.IPTables, "nat", IPTablesChain); err != nil {
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

// newChainIfMissing creates the chain. Two ADDs can race to do so.
func (c *iptablesChanges) newChainIfMissing() error {
	err := c.NewChain("nat", IPTablesChain)
	if exists, failed := c.ChainExists("nat", IPTablesChain); err != nil && failed == nil && exists {
		return nil
	}
	return err
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
		for _, at := range [][2]string{{"nat", "PREROUTING"}, {"filter", "FORWARD"}, {"mangle", "POSTROUTING"}, {"mangle", "FORWARD"}} {
			rules, err := listRules(ipt, at[0], at[1])
			errs = append(errs, err)
			for _, spec := range rules {
				if commentOf(spec) == NodeOwner {
					errs = append(errs, wrapIPTables(strings.Join(spec, " "), ipt.DeleteIfExists(at[0], at[1], spec...)))
				}
			}
		}
		if exists, err := ipt.ChainExists("nat", IPTablesChain); err != nil || exists {
			errs = append(errs, wrapIPTables("chain "+IPTablesChain, errors.Join(err, ipt.ClearAndDeleteChain("nat", IPTablesChain))))
		}
	}
	return errors.Join(errs...)
}
