package imds

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/ratelimit"
)

// conn is a redirected connection, the address that it came from, and the pod that it belongs to.
type conn struct {
	*net.TCPConn
	source   netip.Addr
	onClose  func()        // may be nil
	verified verifiedToken // for the Handler, which serves one request of a connection at a time

	requests   *ratelimit.Keyed[netip.Addr]
	firstToken time.Time // when the first request may begin; zero after that request

	currentHolder Holder
	onReset       func()
	holder        atomic.Pointer[string] // as Holder returns it; nil until a holder is known

	readDeadline atomic.Int64 // in nanoseconds since 1970; 0 for none
}

// SetReadDeadline implements net.Conn. It records the deadline for Connections, which closes the
// connection with the earliest one when all connections are in use.
func (c *conn) SetReadDeadline(t time.Time) error {
	var deadline int64
	if !t.IsZero() {
		deadline = t.UnixNano()
	}
	c.readDeadline.Store(deadline)
	return c.TCPConn.SetReadDeadline(t)
}

// requestRead removes the read deadline after the whole request arrived. Without this, a deadline
// that passes while the answer is in preparation would cancel the request's context.
func (c *conn) requestRead() { c.SetReadDeadline(time.Time{}) }

var errHolderChanged = errors.New("another pod holds the source address of the connection")

// Write implements net.Conn. If another pod holds the source address now, it writes nothing and
// resets the connection. CNI ADD relies on this order: see destroySockets in pkg/attach.
func (c *conn) Write(b []byte) (int, error) {
	if c.resetIfHeldByAnother(c.currentHolder(c.source)) {
		return 0, errHolderChanged
	}
	return c.TCPConn.Write(b)
}

// ReadFrom implements io.ReaderFrom, which net/http prefers to Write. It calls Write.
func (c *conn) ReadFrom(r io.Reader) (int64, error) {
	return io.Copy(struct{ io.Writer }{c}, r)
}

// resetIfHeldByAnother resets the connection unless it belongs to holder.
func (c *conn) resetIfHeldByAnother(holder string) (reset bool) {
	if c.belongsTo(holder) {
		return false
	}
	c.onReset()
	c.SetLinger(0) // the kernel drops what it has not sent yet (socket(7), SO_LINGER)
	c.Close()
	return true
}

// belongsTo reports whether the connection belongs to holder. A connection without a holder is
// assigned to this one, unless holder is empty.
func (c *conn) belongsTo(holder string) bool {
	owner := c.holder.Load()
	if owner == nil {
		if holder == "" {
			return true
		}
		first := holder // a copy, so that only this case allocates
		if c.holder.CompareAndSwap(nil, &first) {
			return true
		}
		owner = c.holder.Load()
	}
	return *owner == holder
}

// Close implements net.Conn.
func (c *conn) Close() error {
	if c.onClose != nil {
		defer c.onClose()
	}
	return c.TCPConn.Close()
}

// ackTimeout is how long sent data may stay unacknowledged, or the pod's window closed, before the
// kernel ends the connection. AWS SDKs wait one second for the metadata service by default (AWS SDKs
// and Tools Reference Guide, "AWS_METADATA_SERVICE_TIMEOUT") and read nothing of the connection later.
const ackTimeout = time.Second

// boundWrites limits writes by TCP_USER_TIMEOUT (tcp(7)), which also covers a window that stays
// closed. One system call for each connection replaces net/http's timer for each answer.
func boundWrites(c *net.TCPConn) {
	raw, err := c.SyscallConn()
	if err != nil {
		return
	}
	raw.Control(func(fd uintptr) {
		unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(ackTimeout.Milliseconds()))
	})
}

type connKey struct{}

// ConnContext passes a connection to the Handler. It is an http.Server.ConnContext.
func ConnContext(ctx context.Context, c net.Conn) context.Context {
	if c, ok := c.(*conn); ok {
		return context.WithValue(ctx, connKey{}, c)
	}
	return ctx
}

func connOf(ctx context.Context) (*conn, bool) {
	c, ok := ctx.Value(connKey{}).(*conn)
	return c, ok
}

// sourceOf returns the source address of a request, or the zero address outside a Listener.
func sourceOf(ctx context.Context) netip.Addr {
	if c, ok := connOf(ctx); ok {
		return c.source
	}
	return netip.Addr{}
}
