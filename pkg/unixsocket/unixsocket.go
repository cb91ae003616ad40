// Package unixsocket listens on and dials unix sockets that only processes of the same user reach:
// the file's mode is 0600, and callers put it into a directory of mode 0700.
package unixsocket

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Dial connects to the unix socket at path. It returns nil and no error if no process listens
// there.
func Dial(ctx context.Context, path string) (*net.UnixConn, error) {
	c, err := new(net.Dialer).DialContext(ctx, "unix", path)
	switch {
	case isAbsence(err):
		return nil, nil
	case err != nil:
		return nil, err
	}
	return c.(*net.UnixConn), nil
}

func isAbsence(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ECONNREFUSED)
}

// IsAbandoned reports whether no process listens at path. It returns false if that cannot be found
// out.
func IsAbandoned(path string) bool {
	c, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		c.Close()
	}
	return isAbsence(err)
}

// Listener is a net.Listener on a unix socket whose file other processes can remove or replace.
// Accept listens again if no process listens at the path: the state directory was removed,
// or a process that had replaced the file has ended.
type Listener struct {
	path     string
	interval time.Duration
	log      *slog.Logger

	mu     sync.Mutex
	socket *net.UnixListener
	closed bool
}

// Listen listens on a unix socket and replaces the file at path. interval is the time between two
// checks that a process listens there. If the file cannot be made, because its file system is full
// for example, Listen logs the error and tries again at each interval. It returns the error of ctx if
// ctx ends first.
func Listen(ctx context.Context, path string, interval time.Duration, log *slog.Logger) (*Listener, error) {
	for {
		socket, err := listen(path)
		if err == nil {
			return &Listener{path: path, interval: interval, log: log, socket: socket}, nil
		}
		log.Warn("cannot listen on the unix socket; trying again", "path", path, "error", err)
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(interval):
		}
	}
}

// listen binds another name and renames it, so a client that dials path always finds a process that
// listens.
func listen(path string) (*net.UnixListener, error) {
	temporary := fmt.Sprintf("%s.%d", path, os.Getpid())
	if err := os.Remove(temporary); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: temporary, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false) // another process may have replaced the file since
	if err := errors.Join(os.Chmod(temporary, 0o600), os.Rename(temporary, path)); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// Accept implements net.Listener. Only one goroutine may call it.
func (l *Listener) Accept() (net.Conn, error) {
	for {
		if err := l.socket.SetDeadline(time.Now().Add(l.interval)); err != nil {
			return nil, err
		}
		c, err := l.socket.Accept()
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return c, err
		}
		if IsAbandoned(l.path) {
			l.log.Warn("no process listens on the unix socket; listening again", "path", l.path)
			if err := l.listenAgain(); err != nil {
				l.log.Warn("cannot listen on the unix socket", "path", l.path, "error", err)
			}
		}
	}
}

func (l *Listener) listenAgain() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return net.ErrClosed
	}
	socket, err := listen(l.path)
	if err != nil {
		return err
	}
	l.socket.Close()
	l.socket = socket
	return nil
}

// Addr implements net.Listener.
func (l *Listener) Addr() net.Addr { return &net.UnixAddr{Name: l.path, Net: "unix"} }

// Close implements net.Listener. It does not remove the file.
func (l *Listener) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	return l.socket.Close()
}
