// Package netlinkwatch receives the kernel's notifications of changes by netlink.
package netlinkwatch

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Watch calls notify when the kernel reports a change that isRelevant selects, or may have reported
// one that was lost. family is a netlink family of this thread's network namespace, and groups are
// its multicast groups as a bit mask. Watch returns nil when ctx ends, or an error if the kernel
// does not notify.
func Watch(ctx context.Context, family int, groups uint32, isRelevant func(netlink.Message) bool, notify func()) error {
	conn, err := netlink.Dial(family, &netlink.Config{Groups: groups})
	if err != nil {
		return fmt.Errorf("notifications of the kernel: %w", err)
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	for {
		messages, err := conn.Receive()
		if ctx.Err() != nil {
			return nil
		}
		// ENOBUFS: the socket's buffer was full, and any notification can be lost.
		if errors.Is(err, unix.ENOBUFS) || slices.ContainsFunc(messages, isRelevant) {
			notify()
		} else if err != nil {
			return fmt.Errorf("notifications of the kernel: %w", err)
		}
	}
}
