// Package unixsocket listens on and dials unix sockets that only processes of the same user reach.
package unixsocket

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Dial connects to the unix socket at path. It returns nil and no error if no process listens there,
// and an error if the process that listens belongs to another user.
func Dial(ctx context.Context, path string) (*net.UnixConn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "unix", path)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ECONNREFUSED) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	c := conn.(*net.UnixConn)
	if err := CheckPeer(c); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// IsAbandoned reports whether no process listens at path. An error of Dial is not evidence for it.
func IsAbandoned(ctx context.Context, path string) bool {
	c, err := Dial(ctx, path)
	if c != nil {
		c.Close()
	}
	return c == nil && err == nil
}

// CheckPeer returns an error if the process at the other end of c belongs to another user than this
// process (unix(7), SO_PEERCRED).
func CheckPeer(c *net.UnixConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	var credErr error
	err = raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if err := errors.Join(err, credErr); err != nil {
		return err
	}
	if int(cred.Uid) != os.Geteuid() {
		return fmt.Errorf("the peer's user is %d, not %d", cred.Uid, os.Geteuid())
	}
	return nil
}

// Listen listens on a unix socket with mode 0600 and replaces the file at path. It binds another
// name and renames it, so a client that dials path always finds a process that listens.
func Listen(path string) (*net.UnixListener, error) {
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

// Server serves a unix socket whose file other processes can remove or replace.
type Server struct {
	Path string
	// Interval is the time between two checks that a process listens at Path.
	Interval time.Duration
	// IsForeign reports whether the socket at Path rightly belongs to another process, so that it is
	// not checked. It may be nil.
	IsForeign func() bool
	// Serve serves a listener until the context ends. The listener is closed when it returns.
	Serve func(context.Context, *net.UnixListener) error
	Log   *slog.Logger
}

// Run listens and calls Serve until ctx ends. It listens again if no process listens at the path, if
// Serve returns, and after an error.
func (s *Server) Run(ctx context.Context) error {
	for ctx.Err() == nil {
		l, err := Listen(s.Path)
		if err == nil {
			err = s.serve(ctx, l)
		}
		if err == nil || ctx.Err() != nil {
			continue
		}
		s.Log.Warn("unix socket not served; retrying", "path", s.Path, "error", err)
		select {
		case <-ctx.Done():
		case <-time.After(s.Interval):
		}
	}
	return nil
}

func (s *Server) serve(ctx context.Context, l *net.UnixListener) error {
	defer l.Close()
	ctx, cancel := context.WithCancel(ctx)
	checked := make(chan struct{})
	go func() {
		defer close(checked)
		s.checkPath(ctx, cancel)
	}()
	defer func() {
		cancel()
		<-checked
	}()
	return s.Serve(ctx, l)
}

// checkPath calls abandoned once no process listens at the path. It returns when ctx ends.
func (s *Server) checkPath(ctx context.Context, abandoned func()) {
	tick := time.NewTicker(s.Interval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if s.IsForeign != nil && s.IsForeign() {
			continue
		}
		if IsAbandoned(ctx, s.Path) {
			s.Log.Warn("no process listens on the unix socket; listening again", "path", s.Path)
			abandoned()
			return
		}
	}
}
