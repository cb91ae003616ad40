package imds

import (
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// conn is a redirected connection and the address that it came from.
//
// What net/http wants to have read by a certain time is noted, and looked at once in a while (open), in place of a timer that is
// set and taken back with each request: they come by the ten thousand a second, and a slow one may as well end a moment late.
type conn struct {
	*net.TCPConn
	source netip.Addr
	closed func() // may be nil
	proof  proof  // for the Handler, which serves one request of a connection at a time

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

// Close implements net.Conn.
func (c *conn) Close() error {
	if c.closed != nil {
		defer c.closed()
	}
	return c.TCPConn.Close()
}

// open are the connections of a Listener. It closes those that have not been read from in time.
type open struct {
	mu    sync.Mutex
	conns map[*conn]bool
	sweep *time.Timer // nil while there is no connection
	every time.Duration
}

// sweepTime is how late a connection may be closed.
const sweepTime = time.Second

func newOpen() *open { return &open{conns: make(map[*conn]bool), every: sweepTime} }

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

// close closes what is late, and comes again as long as there are connections.
func (o *open) close() {
	for _, c := range o.late(time.Now()) {
		c.Close()
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.conns) == 0 {
		o.sweep = nil
		return
	}
	o.sweep.Reset(o.every)
}

func (o *open) late(now time.Time) (late []*conn) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for c := range o.conns {
		if by := c.readBy.Load(); by != 0 && by < now.UnixNano() {
			late = append(late, c)
		}
	}
	return late
}
