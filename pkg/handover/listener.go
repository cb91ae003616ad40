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

// Listener is a TCP listener that can stop accepting and resume. While it is paused, new
// connections wait in the kernel for another process that has the socket.
type Listener struct {
	*net.TCPListener

	mu     sync.Mutex
	paused chan struct{} // nil if the listener accepts, else closed at the end of the pause
}

// Socket is a TCP socket to serve. Its name must identify it completely, because a predecessor's
// socket of the same name is used in its place.
type Socket struct {
	Name    string
	Address string // as for net.Listen
	// ReusePort sets SO_REUSEPORT (socket(7)). While the predecessor has the socket, a successor, and
	// no other process, can then listen on the same port at another address. A connection goes to the
	// more specific address.
	ReusePort bool
}

// Listen listens on the address. It turns MPTCP off, which Go turns on by default: an MPTCP socket
// has neither SO_ORIGINAL_DST nor TCP_USER_TIMEOUT (net/mptcp/sockopt.c). A client that asks for
// MPTCP falls back to TCP.
//
// Only a process with a predecessor shares a port: SO_REUSEPORT is set before bind. Otherwise it is
// set after bind, for a later successor, and bind fails with EADDRINUSE if an unrelated process has
// the port.
func (s Socket) Listen(ctx context.Context, hasPredecessor bool) (*Listener, error) {
	var config net.ListenConfig
	config.SetMultipathTCP(false)
	if s.ReusePort && hasPredecessor {
		config.Control = setReusePort
	}
	l, err := newListener(config.Listen(ctx, "tcp", s.Address))
	if err != nil || !s.ReusePort {
		return l, err
	}
	c, err := l.SyscallConn()
	if err == nil {
		err = setReusePort("", "", c)
	}
	if err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

func setReusePort(_, _ string, c syscall.RawConn) error {
	var optErr error
	err := c.Control(func(fd uintptr) {
		optErr = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
	})
	return errors.Join(err, optErr)
}

// newListener returns a Listener for the results of a function of package net.
func newListener(l net.Listener, err error) (*Listener, error) {
	if err != nil {
		return nil, err
	}
	tcp, ok := l.(*net.TCPListener)
	if !ok {
		l.Close()
		return nil, fmt.Errorf("%s is not a TCP listener", l.Addr().Network())
	}
	return &Listener{TCPListener: tcp}, nil
}

// Accept implements net.Listener. It waits while the listener is paused.
func (l *Listener) Accept() (net.Conn, error) {
	for {
		c, err := l.TCPListener.Accept()
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return c, err
		}
		l.mu.Lock()
		paused := l.paused
		l.mu.Unlock()
		if paused != nil {
			<-paused
		}
	}
}

// Pause makes Accept wait until Resume or Close.
func (l *Listener) Pause() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.paused == nil {
		l.paused = make(chan struct{})
	}
	l.SetDeadline(time.Unix(1, 0)) // a deadline in the past interrupts Accept; it fails if l is closed
}

// Resume ends a pause.
func (l *Listener) Resume() {
	l.SetDeadline(time.Time{})
	l.endPause()
}

// Close implements net.Listener. It closes this process's descriptor only.
func (l *Listener) Close() error {
	err := l.TCPListener.Close()
	l.endPause()
	return err
}

func (l *Listener) endPause() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.paused != nil {
		close(l.paused)
		l.paused = nil
	}
}
