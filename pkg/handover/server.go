package handover

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/unixsocket"
)

// acceptSuccessors answers successors until ctx ends. It replaces the unix socket at the path, so
// new successors connect to this process and no longer to its predecessor.
func (t *Takeover) acceptSuccessors(ctx context.Context, sockets map[string]*Listener) error {
	l, err := unixsocket.Listen(ctx, t.Path, t.checkInterval, t.Log)
	if err != nil {
		return nil // ctx has ended
	}
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	var conns sync.WaitGroup
	defer conns.Wait()
	for {
		c, err := l.Accept()
		switch {
		case err == nil:
			conns.Go(func() { t.serveSuccessor(ctx, c.(*net.UnixConn), sockets) })
		case errors.Is(err, net.ErrClosed):
			return nil
		default: // too many open files, for example
			t.Log.Warn("cannot accept a successor; retrying", "error", err)
			select {
			case <-ctx.Done():
			case <-time.After(time.Second):
			}
		}
	}
}

// serveSuccessor answers the requests of one connection until its peer closes it, or ctx ends. If
// the peer took over and then closed the connection, this process accepts again.
func (t *Takeover) serveSuccessor(ctx context.Context, c *net.UnixConn, sockets map[string]*Listener) {
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	hasTakenOver := false
	for request := make([]byte, 1); ; {
		if _, err := c.Read(request); err != nil {
			break
		}
		if request[0] == requestCommit && !hasTakenOver {
			hasTakenOver = true
			t.pause(sockets)
		}
		if err := t.reply(c, request[0], sockets); err != nil {
			t.Log.Warn("a successor's request failed", "error", err)
			break
		}
	}
	if hasTakenOver && ctx.Err() == nil {
		t.resume(sockets)
	}
}

func (t *Takeover) reply(c *net.UnixConn, request byte, sockets map[string]*Listener) error {
	if err := c.SetWriteDeadline(time.Now().Add(timeout)); err != nil {
		return err
	}
	switch request {
	case requestOffer:
		return t.sendOffer(c, sockets)
	case requestCommit:
		_, err := c.Write([]byte{requestCommit})
		return err
	}
	return fmt.Errorf("unknown request %q", request)
}

func (t *Takeover) sendOffer(c *net.UnixConn, sockets map[string]*Listener) error {
	o := offer{StateVersion: t.stateVersion}
	var fds []int
	for name, l := range sockets {
		f, err := l.File() // a duplicate; closed after the offer is sent
		if err != nil {
			return err
		}
		defer f.Close()
		raw, err := f.SyscallConn()
		if err != nil {
			return err
		}
		if err := raw.Control(func(fd uintptr) { fds = append(fds, int(fd)) }); err != nil {
			return err
		}
		o.Sockets = append(o.Sockets, name)
	}
	var err error
	if o.State, err = t.Export(); err != nil {
		return err
	}
	text, err := json.Marshal(o)
	if err != nil {
		return err
	}
	if _, _, err := c.WriteMsgUnix([]byte{requestOffer}, unix.UnixRights(fds...), nil); err != nil {
		return err
	}
	_, err = c.Write(text)
	return err
}

// pause stops accepting in favour of a successor.
func (t *Takeover) pause(sockets map[string]*Listener) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.successors++
	for _, l := range sockets {
		l.Pause()
	}
	t.Log.Info("handed over to a successor")
}

// resume accepts again, unless there is another successor.
func (t *Takeover) resume(sockets map[string]*Listener) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.successors--; t.successors > 0 {
		return
	}
	t.Log.Warn("the successor has ended; serving again")
	for _, l := range sockets {
		l.Resume()
	}
}

func (t *Takeover) isHandedOver() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.successors > 0
}
