package rules

import (
	"context"
	"errors"
	"strings"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/nft"
)

// Reconcile makes the rules of all records and the node's, and removes the rules of attachments
// that have no record. chosen is the backend of new attachments, or "" if the node has none. It
// returns the changes; with dryRun it makes none. Rules inside pods are not part of it.
func (n *Node) Reconcile(ctx context.Context, records []*attachment.Record, chosen attachment.Backend, dryRun bool) ([]Change, error) {
	byBackend := make(map[attachment.Backend][]*attachment.Record)
	for _, r := range hostRecords(records...) {
		byBackend[r.Backend] = append(byBackend[r.Backend], r)
	}
	withIPTables := byBackend[attachment.BackendIPTables]
	usesIPTables := chosen == attachment.BackendIPTables || len(withIPTables) > 0
	changes, err := n.applyNFT(byBackend[attachment.BackendNFTables], func(conn *nft.Conn, desired nft.Ruleset) ([]Change, error) {
		return conn.ApplyAll(ctx, desired, Table, isAttachment, dryRun)
	})
	if usesIPTables && errors.Is(err, ErrUnsupported) {
		changes, err = n.applyGuard(ctx, dryRun)
	}
	if usesIPTables || !n.isIPTablesClean && n.iptables.isUsed(n) {
		redirections, failed := n.iptables.redirect(ctx, n, withIPTables, isAttachment, dryRun)
		changes, err = append(changes, redirections...), errors.Join(err, failed)
		n.isIPTablesClean = !usesIPTables && err == nil && !dryRun
	}
	probes, failed := n.deleteTables(ctx, func(name string) bool { return strings.HasPrefix(name, nft.ProbePrefix) }, dryRun)
	return append(changes, probes...), errors.Join(err, failed)
}

// Uninstall removes every rule, chain and table of this package.
func (n *Node) Uninstall(ctx context.Context) error {
	var errs []error
	if n.iptables.isUsed(n) {
		errs = append(errs, n.iptables.uninstall(ctx, n))
	}
	// The guard is in nftables and goes last.
	_, err := n.deleteTables(ctx, func(name string) bool { return name == Table || strings.HasPrefix(name, nft.ProbePrefix) }, false)
	return errors.Join(append(errs, err)...)
}

func (n *Node) deleteTables(ctx context.Context, match func(string) bool, dryRun bool) ([]Change, error) {
	conn, err := n.nft()
	if err != nil {
		return nil, err
	}
	changes, err := conn.DeleteTables(ctx, match, dryRun)
	if errors.Is(err, ErrUnsupported) {
		err = nil
	}
	return changes, err
}
