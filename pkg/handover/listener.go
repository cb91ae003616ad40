package handover

import (
	"context"
	"errors"
	"net"
	"os"
	"sync"
	"time"
)

// Listener is a TCP listener that can stop accepting and go on: while it is paused, what is dialled waits in the kernel for whoever
// else has the socket.
type Listener struct {
	*net.TCPListener

	mu     sync.Mutex
	closed bool
	gate   chan struct{} // closed while it accepts
}

// Listen is net.Listen of TCP, for a Listener.
func Listen(ctx context.Context, address string) (*Listener, error) {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	return newListener(l)
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
