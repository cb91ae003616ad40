// Package nft makes nftables equal to a desired state, by netlink and in one transaction.
//
// A caller describes the tables, chains, rules and set elements that it wants (Ruleset), and which
// other elements are its own. Apply and ApplyAll read what the kernel has of these, compute the
// changes, and commit them as a whole or not at all. A dry run returns the changes without making
// them.
//
// An element carries its owner in its comment. Apply reads elements by their keys, so its cost does
// not depend on how many elements a set has. ApplyAll reads them all.
package nft

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// ErrBusy is the error of a change that failed because another process held a lock of the packet
// filter or changed it at the same moment. A later attempt can succeed.
var ErrBusy = errors.New("the packet filter is busy")

// ErrUnsupported is the error of a kernel that lacks what a rule needs.
var ErrUnsupported = errors.New("the kernel does not support it")

// Conn is a netlink connection to the nftables of one network namespace. It is not safe for
// concurrent use.
//
// After a transaction that deleted something, Close blocks for an RCU grace period, some 20 ms: the
// kernel waits at the socket's close until no packet uses the deleted objects (nft_rcv_nl_event in
// net/netfilter/nf_tables_api.c). So callers hold no lock when they call Close.
type Conn struct {
	conn   *nftables.Conn
	socket *netlink.Conn // of conn
	// timeout bounds each read and each transaction; 0 is no bound. A pod with NET_ADMIN can fill the
	// tables of its namespace.
	timeout  time.Duration
	deadline time.Time // of the read or transaction that runs, or zero
	attempts int
}

// attempts is how often a change is computed and tried again when another process changed the same
// objects between the read and the commit.
const attempts = 5

// sendBuffer bounds one transaction: the rules of some ten thousand pods.
const sendBuffer = 8 << 20

// Option changes how Open connects.
type Option func(*config)

type config struct {
	netns   netns.NsHandle
	timeout time.Duration
	options []nftables.ConnOption
}

// InNetns connects to another network namespace than that of the calling thread. The caller keeps
// the handle open until Open returns. timeout bounds each read and each transaction.
func InNetns(handle netns.NsHandle, timeout time.Duration) Option {
	return func(c *config) { c.netns, c.timeout = handle, timeout }
}

// WithConnOptions passes options to the nftables library. Tests use it.
func WithConnOptions(options ...nftables.ConnOption) Option {
	return func(c *config) { c.options = append(c.options, options...) }
}

// Open connects to the nftables of the calling thread's network namespace, or of that in an option.
func Open(options ...Option) (*Conn, error) {
	config := config{netns: netns.None()}
	for _, option := range options {
		option(&config)
	}
	c := &Conn{timeout: config.timeout, attempts: attempts}
	all := append([]nftables.ConnOption{nftables.AsLasting(), nftables.WithSockOptions(func(s *netlink.Conn) error {
		c.socket = s
		// The kernel takes a transaction in one message of at most the send buffer's size: the default of
		// 208 KiB holds the elements of some 300 pods. A process without CAP_NET_ADMIN keeps less.
		_ = s.SetWriteBuffer(sendBuffer)
		return nil
	})}, config.options...)
	if config.netns.IsOpen() {
		all = append(all, nftables.WithNetNSFd(int(config.netns)))
		c.attempts = 2 // the pod can change its tables at any moment
	}
	var err error
	if c.conn, err = nftables.New(all...); err != nil {
		return nil, WrapError(err)
	}
	return c, nil
}

// Close closes the connection. It blocks for an RCU grace period after a deletion.
func (c *Conn) Close() error { return c.conn.CloseLasting() }

// IsExpired reports whether the deadline of the last read or transaction has passed. The kernel's
// answer to it may be unread then, and the next request would read it as its own.
func (c *Conn) IsExpired() bool { return !c.deadline.IsZero() && !time.Now().Before(c.deadline) }

// CheckSupported returns an error that is ErrUnsupported if the kernel has no nf_tables. Other
// faults of the kernel are no error here.
func (c *Conn) CheckSupported(ctx context.Context) error {
	_, err := c.tables(ctx)
	if errors.Is(err, ErrUnsupported) {
		return err
	}
	return nil
}

func (c *Conn) tables(ctx context.Context) ([]*nftables.Table, error) {
	if err := c.setDeadline(ctx); err != nil {
		return nil, err
	}
	tables, err := c.conn.ListTables()
	return tables, wrapReadError(err)
}

// DeleteTables deletes the tables whose names match, in all families. It returns the change for
// each; with dryRun it deletes none.
func (c *Conn) DeleteTables(ctx context.Context, match func(name string) bool, dryRun bool) ([]Change, error) {
	tables, err := c.tables(ctx)
	if err != nil {
		return nil, err
	}
	var changes []Change
	for _, t := range tables {
		if match(t.Name) {
			changes = append(changes, Change{Kind: Stale, Object: tableName(t)})
			if !dryRun {
				c.conn.DelTable(t)
			}
		}
	}
	if dryRun || len(changes) == 0 {
		return changes, nil
	}
	return changes, WrapError(c.conn.Flush())
}

// setDeadline begins the time of one read or one transaction.
func (c *Conn) setDeadline(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	deadline, _ := ctx.Deadline()
	if c.timeout > 0 {
		if step := time.Now().Add(c.timeout); deadline.IsZero() || step.Before(deadline) {
			deadline = step
		}
	}
	if deadline.IsZero() && c.deadline.IsZero() {
		return nil
	}
	c.deadline = deadline
	return c.socket.SetReadDeadline(deadline)
}

// wrapReadError is WrapError for reads. A kernel without nf_tables answers a read with EINVAL, and
// a batch with EOPNOTSUPP (nfnetlink_rcv_msg and nfnetlink_rcv_batch in net/netfilter/nfnetlink.c).
func wrapReadError(err error) error {
	if errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("nftables: %w: %w", ErrUnsupported, err)
	}
	return WrapError(err)
}

// WrapError gives an error of the kernel its meaning: ErrUnsupported or ErrBusy. A kernel that
// lacks the module of an expression or a family answers ENOENT.
func WrapError(err error) error {
	_, isPathError := errors.AsType[*fs.PathError](err)
	switch {
	case err == nil:
		return nil
	case isPathError, errors.Is(err, ErrUnsupported), errors.Is(err, os.ErrDeadlineExceeded):
		return err
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EPROTONOSUPPORT), errors.Is(err, unix.EAFNOSUPPORT),
		errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("nftables: %w: %w", ErrUnsupported, err)
	case errors.Is(err, unix.EBUSY), errors.Is(err, unix.EAGAIN), errors.Is(err, unix.ENOBUFS), errors.Is(err, unix.EINTR):
		return fmt.Errorf("nftables: %w: %w", ErrBusy, err)
	}
	return fmt.Errorf("nftables: %w", err)
}
