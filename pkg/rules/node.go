package rules

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"

	"github.com/google/nftables"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/nft"
)

// Node programs the rules of the network namespace of the thread that first uses it. It is not safe
// for concurrent use. Callers exclude others who change rules of the same addresses.
type Node struct {
	Settings
	log      *slog.Logger
	iptables *iptables
	conn     *nft.Conn
	// ConnOptions are options of the netlink connection. Tests replace the kernel by one.
	ConnOptions []nftables.ConnOption
	// isIPTablesClean says that Reconcile has removed the rules of iptables that no record asks for.
	isIPTablesClean bool
}

// New returns a Node. iptablesDirs are where the iptables commands are looked for, in order.
func New(s Settings, iptablesDirs []string, log *slog.Logger) *Node {
	return &Node{Settings: s, log: log, iptables: &iptables{dirs: iptablesDirs}}
}

// Close closes the netlink connection. It blocks for an RCU grace period after a deletion
// (nft.Conn). The node can be used again.
func (n *Node) Close() {
	if n.conn != nil {
		n.conn.Close()
		n.conn = nil
	}
}

func (n *Node) nft() (*nft.Conn, error) {
	if n.conn != nil && n.conn.IsExpired() {
		n.Close()
	}
	if n.conn == nil {
		conn, err := nft.Open(nft.WithConnOptions(n.ConnOptions...))
		if err != nil {
			return nil, err
		}
		n.conn = conn
	}
	return n.conn, nil
}

// Attach makes the rules of a record, and the node's where they are missing. It removes the rules
// of former, an earlier record of the same attachment or nil, that the record does not have.
func (n *Node) Attach(ctx context.Context, r, former *attachment.Record) error {
	if former != nil && former.Backend != r.Backend {
		if err := n.Detach(ctx, former); err != nil {
			return err
		}
		former = nil
	}
	if former != nil && former.Datapath == r.Datapath && former.HostLink == r.HostLink && slices.Equal(former.Redirects, r.Redirects) {
		former = nil // it has no other rules
	}
	_, err := n.apply(ctx, r, former, false)
	return err
}

// MakeGuard makes the guard where it is missing, and nothing else. It returns the changes.
func (n *Node) MakeGuard(ctx context.Context) ([]Change, error) { return n.applyGuard(ctx, false) }

// applyGuard makes the guard for either backend. It is in nftables where the kernel has them,
// because a flush of iptables does not remove it there.
func (n *Node) applyGuard(ctx context.Context, dryRun bool) ([]Change, error) {
	changes, err := n.applyNFT(nil, func(conn *nft.Conn, desired nft.Ruleset) ([]Change, error) {
		return conn.Apply(ctx, desired, nil, dryRun)
	})
	if !errors.Is(err, ErrUnsupported) || !n.Guard {
		return changes, err
	}
	return n.iptables.makeGuard(ctx, n, dryRun)
}

// Check returns what Attach would change.
func (n *Node) Check(ctx context.Context, r *attachment.Record) ([]Change, error) {
	return n.apply(ctx, r, nil, true)
}

func (n *Node) apply(ctx context.Context, r, former *attachment.Record, dryRun bool) ([]Change, error) {
	if r.Backend == attachment.BackendNFTables {
		return n.applyNFT(hostRecords(r), func(conn *nft.Conn, desired nft.Ruleset) ([]Change, error) {
			return conn.Apply(ctx, desired, elementsOf(former), dryRun)
		})
	}
	guard, err := n.applyGuard(ctx, dryRun)
	if err != nil {
		return guard, err
	}
	changes, err := n.iptables.redirect(ctx, n, hostRecords(r), recordOwner(former), dryRun)
	return append(guard, changes...), err
}

// Detach removes the rules of a record. Rules that are gone are no error, nor is a node that has
// lost its iptables command: the agent removes the rules when the node has it again.
func (n *Node) Detach(ctx context.Context, r *attachment.Record) error {
	if r.Backend == attachment.BackendIPTables {
		_, err := n.iptables.redirect(ctx, n, nil, recordOwner(r), false)
		return err
	}
	return n.remove(func(conn *nft.Conn) error {
		_, err := conn.Apply(ctx, nft.Ruleset{}, elementsOf(r), false)
		return err
	})
}

// DetachID removes all rules of an attachment whose record is missing or unreadable, and returns
// the changes; with dryRun it makes none. It reads the rules of all pods.
func (n *Node) DetachID(ctx context.Context, id string, dryRun bool) (changes []Change, err error) {
	isOwned := func(owner string) bool { return owner == id }
	err = n.remove(func(conn *nft.Conn) error {
		changes, err = conn.ApplyAll(ctx, nft.Ruleset{}, Table, isOwned, dryRun)
		return err
	})
	if !n.iptables.isUsed(n) {
		return changes, err
	}
	inIPTables, failed := n.iptables.redirect(ctx, n, nil, isOwned, dryRun)
	return append(changes, inIPTables...), errors.Join(err, failed)
}

// remove calls do, which removes elements. A kernel without nftables has none.
func (n *Node) remove(do func(*nft.Conn) error) error {
	conn, err := n.nft()
	if err == nil {
		err = do(conn)
	}
	if errors.Is(err, ErrUnsupported) {
		return nil
	}
	return err
}

// applyNFT calls apply with the desired guard and the rules of records with the nftables backend.
// If the kernel lacks nftables for IPv6 only, it calls apply again without the IPv6 guard.
func (n *Node) applyNFT(records []*attachment.Record, apply func(*nft.Conn, nft.Ruleset) ([]Change, error)) ([]Change, error) {
	conn, err := n.nft()
	if err != nil {
		return nil, err
	}
	services := n.allServices(records)
	desired := func(guarded []netip.AddrPort) nft.Ruleset {
		var rs nft.Ruleset
		if n.Guard {
			rs = guard(guarded)
		}
		rs.Append(n.redirection(records))
		rs.Append(n.binding(records, services))
		return rs
	}
	changes, err := apply(conn, desired(services))
	if !n.Guard || !errors.Is(err, ErrUnsupported) || len(redirectedServices(records, ipv6)) > 0 {
		return changes, err
	}
	// The kernel may have IPv6 without nftables for it. IPv4 pods are attached without its guard.
	withoutIPv6 := slices.DeleteFunc(slices.Clone(services), func(service netip.AddrPort) bool { return familyOf(service.Addr()) == ipv6 })
	if len(withoutIPv6) == len(services) {
		return changes, err
	}
	changes, failed := apply(conn, desired(withoutIPv6))
	if errors.Is(failed, ErrUnsupported) {
		return nil, err // the kernel has no nftables at all
	}
	n.logUnguarded(attachment.MetadataIPv6, err)
	return changes, failed
}

func (n *Node) logUnguarded(service netip.Addr, err error) {
	n.log.Warn("The kernel cannot guard an IP family, and no network has assigned a pod an address of it. A pod that gives itself such an address is not refused.",
		"metadata", netip.AddrPortFrom(service, attachment.MetadataPort), "error", err)
}
