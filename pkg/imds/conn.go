package imds

import (
	"errors"
	"io"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/ratelimit"
)

// conn is a redirected connection and the address that it came from.
//
// Read deadlines are enforced by a sweep once a second (open), which saves a timer per request.
type conn struct {
	*net.TCPConn
	source netip.Addr
	closed func() // may be nil
	proof  proof  // for the Handler, which serves one request of a connection at a time

	requests *ratelimit.Keyed[netip.Addr]
	first    time.Time // when the token of the first request is there; zero after that request

	holderOf    Holder
	otherHolder func()                 // called when the connection is reset because another pod holds its address
	holder      atomic.Pointer[string] // the pod that the connection belongs to, as Holder returns it; nil while that is not known

	readBy      atomic.Int64 // in nanoseconds since 1970; 0 for no end
	interrupted atomic.Bool  // whether a deadline of the kernel's poller ends reads at once
}

// interruption is what is before every time that anybody means: net/http ends a read of its own by such a deadline.
var interruption = time.Unix(1<<20, 0)

// SetReadDeadline implements net.Conn.
func (c *conn) SetReadDeadline(t time.Time) error {
	if !t.IsZero() && t.Before(interruption) {
		c.interrupted.Store(true)
		return c.TCPConn.SetReadDeadline(t)
	}
	var by int64
	if !t.IsZero() {
		by = t.UnixNano()
	}
	c.readBy.Store(by)
	if c.interrupted.CompareAndSwap(true, false) {
		return c.TCPConn.SetReadDeadline(time.Time{})
	}
	return nil
}

// SetDeadline implements net.Conn.
func (c *conn) SetDeadline(t time.Time) error {
	if err := c.SetReadDeadline(t); err != nil {
		return err
	}
	return c.SetWriteDeadline(t)
}

// read says that all of a request is there: how long its answer takes is not for its sender to hurry.
func (c *conn) read() { c.readBy.Store(0) }

var errOtherHolder = errors.New("the source address of the connection has another holder")

// Write implements net.Conn. It resets the connection, and writes nothing, where another pod holds the source address than
// the one that the connection belongs to. CNI ADD relies on this order: see destroySockets in pkg/node.
func (c *conn) Write(b []byte) (int, error) {
	if !c.claim(c.holderOf(c.source)) {
		c.reset()
		return 0, errOtherHolder
	}
	return c.TCPConn.Write(b)
}

// ReadFrom implements io.ReaderFrom, which net/http prefers to Write, by way of Write.
func (c *conn) ReadFrom(r io.Reader) (int64, error) {
	return io.Copy(struct{ io.Writer }{c}, r)
}

// claim reports whether the connection belongs to holder. It assigns a connection that belongs to no holder yet to this one,
// unless holder is empty.
func (c *conn) claim(holder string) (ok bool) {
	belongsTo := c.holder.Load()
	if belongsTo == nil {
		if holder == "" {
			return true
		}
		first := holder // a copy, so that only this case allocates
		if c.holder.CompareAndSwap(nil, &first) {
			return true
		}
		belongsTo = c.holder.Load()
	}
	return *belongsTo == holder
}

// reset closes the connection of another holder. The kernel drops what it has not sent (socket(7), SO_LINGER).
func (c *conn) reset() {
	c.otherHolder()
	c.SetLinger(0)
	c.Close()
}

// Close implements net.Conn.
func (c *conn) Close() error {
	if c.closed != nil {
		defer c.closed()
	}
	return c.TCPConn.Close()
}

// open are the connections of a Listener. It closes those that have not been read from in time, and resets those whose source
// address has another holder.
type open struct {
	holder Holder

	mu    sync.Mutex
	conns map[*conn]bool
	sweep *time.Timer // nil while there is no connection
	every time.Duration
}

// sweepTime is how late a connection may be closed.
const sweepTime = time.Second

func newOpen(holder Holder) *open {
	return &open{holder: holder, conns: make(map[*conn]bool), every: sweepTime}
}

func (o *open) add(c *conn) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.conns[c] = true
	if o.sweep == nil {
		o.sweep = time.AfterFunc(o.every, o.close)
	}
}

func (o *open) remove(c *conn) {
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.conns, c)
}

func (o *open) len() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.conns)
}

// close closes what is late and resets what has another holder, and comes again as long as there are connections.
func (o *open) close() {
	now := time.Now()
	holders := make(map[netip.Addr]string)
	for _, c := range o.all() {
		holder, asked := holders[c.source]
		if !asked {
			holder = o.holder(c.source)
			holders[c.source] = holder
		}
		switch {
		case !c.claim(holder):
			c.reset()
		case c.isLate(now):
			c.Close()
		}
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.conns) == 0 {
		o.sweep = nil
		return
	}
	o.sweep.Reset(o.every)
}

func (o *open) all() []*conn {
	o.mu.Lock()
	defer o.mu.Unlock()
	return slices.Collect(maps.Keys(o.conns))
}

// isLate reports whether the connection should have been read from by now.
func (c *conn) isLate(now time.Time) bool {
	by := c.readBy.Load()
	return by != 0 && by < now.UnixNano()
}
