package handover

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Listener is a TCP listener that can stop accepting and resume. While it is paused, new connections
// wait in the kernel for another process that has the socket.
type Listener struct {
	*net.TCPListener

	mu     sync.Mutex
	closed bool
	gate   chan struct{} // closed while the listener accepts
}

// Listen listens on a TCP address. It turns MPTCP off, which Go turns on by default: an MPTCP socket
// has neither SO_ORIGINAL_DST nor TCP_USER_TIMEOUT (net/mptcp/sockopt.c). A client that asks for MPTCP
// falls back to TCP.
func Listen(ctx context.Context, address string) (*Listener, error) {
	var config net.ListenConfig
	config.SetMultipathTCP(false)
	l, err := config.Listen(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	return newListener(l)
}

// listenBeside listens on an address whose port other has on another address. Both sockets allow it
// for that moment (socket(7), SO_REUSEPORT), and refuse the port to a third socket afterwards. A
// connection goes to the socket with the more specific address.
func listenBeside(ctx context.Context, address string, other *Listener) (*Listener, error) {
	otherConn, err := other.SyscallConn()
	if err != nil {
		return nil, err
	}
	if err := setReusePort(otherConn, 1); err != nil {
		return nil, err
	}
	defer setReusePort(otherConn, 0)
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error { return setReusePort(c, 1) }}
	config.SetMultipathTCP(false)
	tcp, err := config.Listen(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	l, err := newListener(tcp)
	if err != nil {
		return nil, err
	}
	conn, err := l.SyscallConn()
	if err == nil {
		err = setReusePort(conn, 0)
	}
	if err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

func setReusePort(c syscall.RawConn, value int) error {
	var optErr error
	err := c.Control(func(fd uintptr) {
		optErr = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, value)
	})
	return errors.Join(err, optErr)
}

// fileListener returns a listener on a duplicate of a socket.
func fileListener(f *os.File) (*Listener, error) {
	l, err := net.FileListener(f)
	if err != nil {
		return nil, err
	}
	return newListener(l)
}

func newListener(l net.Listener) (*Listener, error) {
	tcp, ok := l.(*net.TCPListener)
	if !ok {
		l.Close()
		return nil, fmt.Errorf("%s is not a TCP listener", l.Addr().Network())
	}
	open := make(chan struct{})
	close(open)
	return &Listener{TCPListener: tcp, gate: open}, nil
}

// Port returns the port of the listener.
func (l *Listener) Port() uint16 { return l.Addr().(*net.TCPAddr).AddrPort().Port() }

// Accept implements net.Listener. It waits while the listener is paused.
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

// Pause makes Accept wait until Resume or Close.
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
	return l.SetDeadline(time.Unix(1, 0)) // a deadline in the past interrupts Accept
}

// Resume ends a pause.
func (l *Listener) Resume() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	err := l.SetDeadline(time.Time{})
	l.openGate()
	return err
}

func (l *Listener) openGate() {
	select {
	case <-l.gate:
	default:
		close(l.gate)
	}
}

// Close implements net.Listener. It closes this process's descriptor only.
func (l *Listener) Close() error {
	l.mu.Lock()
	l.closed = true
	l.openGate()
	l.mu.Unlock()
	return l.TCPListener.Close()
}
