package handover

import (
	"context"
	"errors"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Listener is a TCP listener that can stop accepting and go on: while it is paused, what is dialled waits in the kernel for whoever
// else has the socket.
type Listener struct {
	*net.TCPListener

	mu     sync.Mutex
	closed bool
	gate   chan struct{} // closed while it accepts
}

// Listen is net.Listen of TCP, for a Listener. It leaves MPTCP off, which Go has on by default: an MPTCP socket has neither
// SO_ORIGINAL_DST nor TCP_USER_TIMEOUT (net/mptcp/sockopt.c). A client that asks for MPTCP is served by TCP.
func Listen(ctx context.Context, address string) (*Listener, error) {
	var config net.ListenConfig
	config.SetMultipathTCP(false)
	l, err := config.Listen(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	return newListener(l)
}

// ListenBeside is Listen on an address whose port another socket of the same user, other, has on
// another address. The kernel lets both have the port because both allow it (socket(7),
// SO_REUSEPORT); a connection goes to the socket with the more specific address.
func ListenBeside(ctx context.Context, address string, other *Listener) (*Listener, error) {
	raw, err := other.SyscallConn()
	if err != nil {
		return nil, err
	}
	if err := shared(raw, true); err != nil {
		return nil, err
	}
	defer shared(raw, false)
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error { return shared(c, true) }}
	l, err := config.Listen(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	mine, err := newListener(l)
	if err != nil {
		return nil, err
	}
	// From now on the port is refused to any other socket again.
	if raw, err = mine.SyscallConn(); err == nil {
		err = shared(raw, false)
	}
	if err != nil {
		mine.Close()
		return nil, err
	}
	return mine, nil
}

// shared sets whether another socket of the same user may have a socket's port.
func shared(c syscall.RawConn, yes bool) error {
	value := 0
	if yes {
		value = 1
	}
	var failed error
	err := c.Control(func(fd uintptr) { failed = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, value) })
	return errors.Join(err, failed)
}

func newListener(l net.Listener) (*Listener, error) {
	tcp, ok := l.(*net.TCPListener)
	if !ok {
		l.Close()
		return nil, errors.New("no TCP listener")
	}
	open := make(chan struct{})
	close(open)
	return &Listener{TCPListener: tcp, gate: open}, nil
}

// past is a deadline that ends what waits at once.
var past = time.Unix(1, 0)

// Accept implements net.Listener. While the Listener is paused it waits.
func (l *Listener) Accept() (net.Conn, error) {
	for {
		l.mu.Lock()
		gate, closed := l.gate, l.closed
		l.mu.Unlock()
		if closed {
			return nil, net.ErrClosed
		}
		<-gate
		c, err := l.TCPListener.Accept()
		if err == nil || !errors.Is(err, os.ErrDeadlineExceeded) {
			return c, err
		}
	}
}

// Pause has Accept wait from now on. A connection that it returned before stays its caller's.
func (l *Listener) Pause() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case <-l.gate:
		if !l.closed {
			l.gate = make(chan struct{})
		}
	default:
	}
	return l.SetDeadline(past)
}

// Resume ends a pause.
func (l *Listener) Resume() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	err := l.SetDeadline(time.Time{})
	l.open()
	return err
}

func (l *Listener) open() {
	select {
	case <-l.gate:
	default:
		close(l.gate)
	}
}

// Close implements net.Listener. It closes this process's socket; another's that is the same stays open.
func (l *Listener) Close() error {
	l.mu.Lock()
	l.closed = true
	l.open()
	l.mu.Unlock()
	return l.TCPListener.Close()
}
