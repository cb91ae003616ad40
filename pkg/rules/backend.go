package rules

import (
	"context"
	"fmt"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
)

// checkSupported returns an error that is ErrUnsupported if the kernel has no nftables.
func (n *Node) checkSupported(ctx context.Context) error {
	conn, err := n.nft()
	if err != nil {
		return err
	}
	return conn.CheckSupported(ctx)
}

// ChooseBackend returns the backend that a configuration means: "auto" is nftables if the kernel
// has it, and iptables otherwise. The error is ErrNoIPTables or ErrUnsupported if the node lacks
// the backend.
func (n *Node) ChooseBackend(ctx context.Context, configured string) (attachment.Backend, error) {
	if configured != string(attachment.BackendIPTables) {
		err := n.checkSupported(ctx)
		if err == nil {
			return attachment.BackendNFTables, nil
		}
		if configured != "auto" {
			return "", err
		}
		if _, missing := n.iptables.find(ctx, n, ipv4); missing != nil {
			return "", fmt.Errorf("%w; %w", err, missing)
		}
		return attachment.BackendIPTables, nil
	}
	_, err := n.iptables.find(ctx, n, ipv4)
	return attachment.BackendIPTables, err
}
