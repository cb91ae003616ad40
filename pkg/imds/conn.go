package imds

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// conn is a redirected connection, the address that it came from, and the pod that it belongs to.
type conn struct {
	*net.TCPConn
	listener *Listener
	source   netip.Addr

	verified   verifiedToken // for the Handler, which serves one request of a connection at a time
	firstToken time.Time     // when the first request may begin; zero after that request
	isBusy     atomic.Bool   // whether a request is in progress
	isReset    atomic.Bool   // whether another pod was found to hold the source address

	mu     sync.Mutex
	holder string // as Holder returns it; empty until a holder is known
}

// maxRequestBody is more than any SDK sends. Some send a form, and s3fs sends a chunked body after
// 100-continue.
const maxRequestBody = 4 << 10

// finishRead reads the body of a request and removes the read deadline, which would otherwise
// cancel the request's context if it passed before the answer is complete. If the body is
// malformed, too long, or incomplete at the deadline, finishRead closes the connection without an
// answer, by a panic with
// http.ErrAbortHandler.
func (c *conn) finishRead(r *http.Request) {
	if r.ContentLength != 0 {
		if _, err := io.CopyN(io.Discard, r.Body, maxRequestBody); err != io.EOF {
			panic(http.ErrAbortHandler)
		}
	}
	c.SetReadDeadline(time.Time{})
}

var errHolderChanged = errors.New("another pod holds the source address of the connection")

// Write implements net.Conn. If another pod holds the source address now, it writes nothing and
// resets the connection. CNI ADD relies on this order: see destroySockets in pkg/attach.
func (c *conn) Write(b []byte) (int, error) {
	if c.resetIfHeldByAnother() {
		return 0, errHolderChanged
	}
	return c.TCPConn.Write(b)
}

// ReadFrom implements io.ReaderFrom, which net/http prefers to Write. It calls Write.
func (c *conn) ReadFrom(r io.Reader) (int64, error) {
	return io.Copy(struct{ io.Writer }{c}, r)
}

// resetIfHeldByAnother resets the connection unless the holder of the source address may claim it.
func (c *conn) resetIfHeldByAnother() (reset bool) {
	if c.claim(c.listener.holder(c.source)) {
		return false
	}
	if c.isReset.CompareAndSwap(false, true) {
		c.listener.log.Debug("connection reset: another pod holds its address", "source", c.source)
		c.listener.refused()
	}
	c.SetLinger(0) // the kernel drops what it has not sent yet (socket(7), SO_LINGER)
	c.Close()
	return true
}

// claim reports whether the connection belongs to holder. The first holder that is known claims it.
func (c *conn) claim(holder string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.holder == "" {
		c.holder = holder
	}
	return c.holder == holder
}

// Close implements net.Conn.
func (c *conn) Close() error {
	defer c.listener.connections.remove(c)
	return c.TCPConn.Close()
}

// ackTimeout is how long sent data may stay unacknowledged, or the pod's window closed, before the
// kernel ends the connection. AWS SDKs wait one second for the metadata service by default (AWS
// SDKs and Tools Reference Guide, "AWS_METADATA_SERVICE_TIMEOUT") and read nothing of the
// connection later.
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
	return context.WithValue(ctx, connKey{}, c)
}
