package handover

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Server hands over to a successor.
type Server struct {
	// Path is where the unix socket is, in a directory that only this process's user can write.
	Path string
	// Sockets are handed over, in this order.
	Sockets []*Listener
	// State is what a successor is told. It may be nil.
	State func() ([]byte, error)
	// Handed is called with true when a successor has taken over, and with false when it is gone and this process goes on. It may be nil.
	Handed func(bool)
	Log    *slog.Logger

	looks time.Duration // for tests; zero for looks

	mu        sync.Mutex
	successor *net.UnixConn // who has taken over
	again     func()        // makes the path this process's once more
}

// Run waits for successors until ctx ends. What is at the path is replaced: a predecessor's successors are this process's from now on.
func (s *Server) Run(ctx context.Context) error {
	var conns sync.WaitGroup
	defer conns.Wait()
	for first := true; ctx.Err() == nil; first = false {
		l, err := ListenUnix(s.Path)
		if err != nil && first {
			return err
		}
		if err != nil {
			s.Log.Warn("no successor can find this process", "error", err)
			pause(ctx)
			continue
		}
		stop := context.AfterFunc(ctx, func() { l.Close() })
		accepting, end := context.WithCancel(ctx)
		conns.Go(func() { s.keep(accepting, l) })
		s.accept(ctx, l, &conns)
		end()
		stop()
		l.Close()
	}
	return nil
}

// looks is how often the path is looked at.
const looks = 10 * time.Second

// keep has the path be this process's once more where nobody is found at it, until ctx ends: somebody removed it, or it became another's who has
// ended since. While a successor serves it is that one's business.
func (s *Server) keep(ctx context.Context, l *net.UnixListener) {
	tick := time.NewTicker(cmp.Or(s.looks, looks))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		s.mu.Lock()
		handed := s.successor != nil
		s.mu.Unlock()
		if handed {
			continue
		}
		found, err := Find(ctx, s.Path)
		if found != nil {
			found.Close()
		} else if err == nil {
			s.Log.Warn("no successor finds this process any more: listening anew", "path", s.Path)
			l.Close()
			return
		}
	}
}

// accept takes those who may become the successor, until ctx ends or the listener is closed: the path is to be this process's again then.
func (s *Server) accept(ctx context.Context, l *net.UnixListener, conns *sync.WaitGroup) {
	s.mu.Lock()
	s.again = sync.OnceFunc(func() { l.Close() })
	s.mu.Unlock()
	for {
		c, err := l.AcceptUnix()
		if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			s.Log.Warn("a successor could not be accepted", "error", err) // out of descriptors, most likely
			pause(ctx)
			continue
		}
		conns.Go(func() {
			defer c.Close()
			end := context.AfterFunc(ctx, func() { c.Close() })
			defer end()
			if err := s.serve(c); err != nil && ctx.Err() == nil {
				s.Log.Warn("a successor", "error", err)
			}
			if ctx.Err() == nil {
				s.gone(c)
			}
		})
	}
}

func pause(ctx context.Context) {
	select {
	case <-ctx.Done():
	case <-time.After(time.Second):
	}
}

// ListenUnix listens on a unix socket that only this process's user can reach, in place of what is
// at the path. It makes the socket under another name and renames it, so that at any moment
// somebody is found at the path.
func ListenUnix(path string) (*net.UnixListener, error) {
	temporary := fmt.Sprintf("%s.%d", path, os.Getpid())
	if err := os.Remove(temporary); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: temporary, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false) // the path is a successor's by then
	if err := errors.Join(os.Chmod(temporary, 0o600), os.Rename(temporary, path)); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// serve answers one who may become the successor, until it is gone.
func (s *Server) serve(c *net.UnixConn) error {
	if err := checkPeer(c); err != nil {
		return err
	}
	request := make([]byte, 1)
	for {
		if n, err := c.Read(request); n == 0 || err != nil {
			return nil // it is gone
		}
		if err := c.SetWriteDeadline(time.Now().Add(patience)); err != nil {
			return err
		}
		var err error
		switch request[0] {
		case askState:
			err = s.tell(c)
		case askSockets:
			err = s.give(c)
		case serving:
			err = s.hand(c)
		default:
			err = fmt.Errorf("it asked for %#x", request[0])
		}
		if err != nil {
			return err
		}
	}
}

func (s *Server) tell(c *net.UnixConn) error {
	var state []byte
	if s.State != nil {
		var err error
		if state, err = s.State(); err != nil {
			return err
		}
	}
	if _, err := c.Write(binary.BigEndian.AppendUint64(nil, uint64(len(state)))); err != nil {
		return err
	}
	_, err := c.Write(state)
	return err
}

// give sends the sockets (unix(7), SCM_RIGHTS).
func (s *Server) give(c *net.UnixConn) error {
	return descriptors(s.Sockets, nil, func(fds []int) error {
		_, _, err := c.WriteMsgUnix([]byte{askSockets}, unix.UnixRights(fds...), nil)
		return err
	})
}

// descriptors calls do while none of the sockets is closed.
func descriptors(sockets []*Listener, fds []int, do func([]int) error) error {
	if len(sockets) == 0 {
		return do(fds)
	}
	var raw syscall.RawConn
	raw, err := sockets[0].SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	if err := raw.Control(func(fd uintptr) { failed = descriptors(sockets[1:], append(fds, int(fd)), do) }); err != nil {
		return err
	}
	return failed
}

// hand stops accepting here.
func (s *Server) hand(c *net.UnixConn) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.Sockets {
		if err := l.Pause(); err != nil {
			s.resume()
			return err
		}
	}
	s.successor = c
	s.Log.Info("handed over to a successor")
	if s.Handed != nil {
		s.Handed(true)
	}
	_, err := c.Write([]byte{serving})
	return err
}

// gone goes on where the successor is gone that had taken over.
func (s *Server) gone(c *net.UnixConn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.successor != c {
		return
	}
	s.successor = nil
	s.Log.Warn("the successor is gone; going on in its place")
	s.resume()
	s.again() // what is at the path was the successor's
	if s.Handed != nil {
		s.Handed(false)
	}
}

func (s *Server) resume() {
	for _, l := range s.Sockets {
		if err := l.Resume(); err != nil {
			s.Log.Error("a socket is not accepted on", "address", l.Addr(), "error", err)
		}
	}
}
