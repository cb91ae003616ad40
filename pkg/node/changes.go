package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Changes tells that somebody changed the kernel's nftables, of which iptables in its nft form is a user: one value for
// however many changes since the last was taken. iptables-legacy changes come unsaid. It ends with ctx; an error means that
// the kernel does not tell.
func Changes(ctx context.Context, log *slog.Logger) (<-chan struct{}, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{Groups: 1 << (unix.NFNLGRP_NFTABLES - 1)})
	if err != nil {
		return nil, fmt.Errorf("changes of nftables: %w", err)
	}
	changes := make(chan struct{}, 1)
	context.AfterFunc(ctx, func() { conn.Close() })
	go func() {
		for {
			_, err := conn.Receive()
			if ctx.Err() != nil {
				return
			}
			// Too many at once for the socket are a change, too.
			if err != nil && !errors.Is(err, unix.ENOBUFS) {
				log.Warn("the kernel no longer tells of changes of nftables; they are found by looking", "error", err)
				return
			}
			select {
			case changes <- struct{}{}:
			default:
			}
		}
	}()
	return changes, nil
}
