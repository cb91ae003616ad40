package handover

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/unixsocket"
)

// checkInterval is the time between two checks of the unix socket.
const checkInterval = 10 * time.Second

// Server hands sockets and state over to a successor.
type Server struct {
	// Path is the path of the unix socket, in a directory that only this process's user can write.
	Path string
	// Sockets are the sockets by name.
	Sockets map[string]*Listener
	// State returns the state. It may be nil.
	State func() ([]byte, error)
	// OnChange is called with true when a successor has taken over, and with false when it has ended
	// and this process accepts again. It may be nil.
	OnChange func(handedOver bool)
	Log      *slog.Logger

	checkInterval time.Duration // for tests; zero for the constant

	mu        sync.Mutex
	successor *net.UnixConn // the connection of the successor that has taken over, or nil
	relisten  func()        // replaces the socket at the path by one of this process
}

// Run answers successors until ctx ends. It replaces the socket at the path: successors of the
// predecessor are successors of this process from then on.
func (s *Server) Run(ctx context.Context) error {
	var conns sync.WaitGroup
	defer conns.Wait()
	socket := &unixsocket.Server{
		Path: s.Path, Interval: cmp.Or(s.checkInterval, checkInterval), IsForeign: s.isHandedOver, Log: s.Log,
		Serve: func(listening context.Context, l *net.UnixListener) error {
			return s.accept(ctx, listening, l, &conns)
		},
	}
	return socket.Run(ctx)
}

// isHandedOver reports whether a successor has taken over. The socket at the path is then its own.
func (s *Server) isHandedOver() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.successor != nil
}

// accept accepts successors until listening ends. Their connections last until ctx ends.
func (s *Server) accept(ctx, listening context.Context, l *net.UnixListener, conns *sync.WaitGroup) error {
	stop := context.AfterFunc(listening, func() { l.Close() })
	defer stop()
	s.mu.Lock()
	s.relisten = func() { l.Close() }
	s.mu.Unlock()
	for {
		c, err := l.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return err
		}
		conns.Go(func() {
			defer c.Close()
			stop := context.AfterFunc(ctx, func() { c.Close() })
			defer stop()
			if err := s.serve(c); err != nil && ctx.Err() == nil {
				s.Log.Warn("a successor's request failed", "error", err)
			}
			if ctx.Err() == nil {
				s.resume(c)
			}
		})
	}
}

// serve answers the requests of one connection until its peer closes it.
func (s *Server) serve(c *net.UnixConn) error {
	if err := unixsocket.CheckPeer(c); err != nil {
		return err
	}
	request := make([]byte, 1)
	for {
		if n, err := c.Read(request); n == 0 || err != nil {
			return nil
		}
		if err := c.SetWriteDeadline(time.Now().Add(timeout)); err != nil {
			return err
		}
		var err error
		switch request[0] {
		case requestState:
			err = s.sendState(c)
		case requestSockets:
			err = s.sendSockets(c)
		case requestCommit:
			err = s.handOver(c)
		default:
			err = fmt.Errorf("unknown request %q", request[0])
		}
		if err != nil {
			return err
		}
	}
}

func (s *Server) sendState(c *net.UnixConn) error {
	var state []byte
	if s.State != nil {
		var err error
		if state, err = s.State(); err != nil {
			return err
		}
	}
	return writeReply(c, requestState, append([]byte{stateVersion}, state...))
}

func (s *Server) sendSockets(c *net.UnixConn) error {
	names, listeners := make([]string, 0, len(s.Sockets)), make([]*Listener, 0, len(s.Sockets))
	for name, l := range s.Sockets {
		names, listeners = append(names, name), append(listeners, l)
	}
	payload, err := json.Marshal(names)
	if err != nil {
		return err
	}
	return withDescriptors(listeners, nil, func(fds []int) error {
		return writeReply(c, requestSockets, payload, fds...)
	})
}

// withDescriptors calls do while none of the sockets is closed.
func withDescriptors(listeners []*Listener, fds []int, do func([]int) error) error {
	if len(listeners) == 0 {
		return do(fds)
	}
	var raw syscall.RawConn
	raw, err := listeners[0].SyscallConn()
	if err != nil {
		return err
	}
	var doErr error
	err = raw.Control(func(fd uintptr) { doErr = withDescriptors(listeners[1:], append(fds, int(fd)), do) })
	return errors.Join(err, doErr)
}

// handOver stops accepting in favour of the successor at the other end of c.
func (s *Server) handOver(c *net.UnixConn) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.Sockets {
		if err := l.Pause(); err != nil {
			s.resumeSockets()
			return err
		}
	}
	s.successor = c
	s.Log.Info("handed over to a successor")
	if s.OnChange != nil {
		s.OnChange(true)
	}
	return writeReply(c, requestCommit, nil)
}

// resume accepts again if the successor that had taken over was at the other end of c.
func (s *Server) resume(c *net.UnixConn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.successor != c {
		return
	}
	s.successor = nil
	s.Log.Warn("the successor has ended; serving again")
	s.resumeSockets()
	s.relisten()
	if s.OnChange != nil {
		s.OnChange(false)
	}
}

func (s *Server) resumeSockets() {
	for name, l := range s.Sockets {
		if err := l.Resume(); err != nil {
			s.Log.Error("a socket is not accepted on", "socket", name, "error", err)
		}
	}
}
