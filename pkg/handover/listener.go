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
	paused chan struct{} // nil if the listener accepts, else closed at the end of the pause
}

// Listen listens on a TCP address. It turns MPTCP off, which Go turns on by default: an MPTCP socket
// has neither SO_ORIGINAL_DST nor TCP_USER_TIMEOUT (net/mptcp/sockopt.c). A client that asks for MPTCP
// falls back to TCP.
func Listen(ctx context.Context, address string) (*Listener, error) {
	return listen(ctx, address, net.ListenConfig{})
}

func listen(ctx context.Context, address string, config net.ListenConfig) (*Listener, error) {
	config.SetMultipathTCP(false)
	return newListener(config.Listen(ctx, "tcp", address))
}

// listenBeside listens on an address whose port other has on another address. The kernel allows it
// because both sockets have SO_REUSEPORT (socket(7)). A connection goes to the socket with the more
// specific address.
func listenBeside(ctx context.Context, address string, other *Listener) (*Listener, error) {
	c, err := other.SyscallConn()
	if err != nil {
		return nil, err
	}
	if err := setReusePort("", "", c); err != nil {
		return nil, err
	}
	return listen(ctx, address, net.ListenConfig{Control: setReusePort})
}

func setReusePort(_, _ string, c syscall.RawConn) error {
	var optErr error
	err := c.Control(func(fd uintptr) {
		optErr = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
	})
	return errors.Join(err, optErr)
}

// newListener returns a Listener on what a function of package net returned.
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

// Port returns the port of the listener.
func (l *Listener) Port() uint16 { return l.Addr().(*net.TCPAddr).AddrPort().Port() }

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
