// Package handover lets one process take the place of another without a moment in which nobody listens: the sockets themselves change
// hands, over a unix socket, together with what the predecessor knows.
//
// A successor that is ready asks for the sockets, serves on them, and says so; only then the predecessor stops accepting, and answers
// those that it has already. A connection that is dialled in between is accepted by the one or the other. The predecessor keeps its
// sockets until it ends, and goes on accepting if its successor dies before.
package handover

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// The successor's requests, a byte each.
const (
	askState   = 'c' // answered by a length of 8 bytes, big-endian, and so many bytes
	askSockets = 's' // answered by one byte, with the sockets in a control message
	serving    = 'a' // answered by one byte, once the predecessor has stopped accepting
)

const (
	// patience bounds each answer.
	patience = 10 * time.Second
	// maxState bounds what a predecessor may say that it knows.
	maxState = 64 << 20
	// maxSockets bounds how many sockets change hands.
	maxSockets = 8
)

// Predecessor is the process that serves now.
type Predecessor struct {
	conn *net.UnixConn
	read *bufio.Reader
}

// Find is who serves, by the path of its unix socket; nil where nobody does. Closing it, or the end of this process, tells the predecessor
// that its successor is gone.
func Find(ctx context.Context, path string) (*Predecessor, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "unix", path)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ECONNREFUSED) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	c := conn.(*net.UnixConn)
	if err := checkPeer(c); err != nil {
		c.Close()
		return nil, err
	}
	return &Predecessor{conn: c, read: bufio.NewReader(c)}, nil
}

// Close lets go of the predecessor.
func (p *Predecessor) Close() error { return p.conn.Close() }

// Gone tells whether the predecessor has ended. It says nothing that it is not asked for.
func (p *Predecessor) Gone() bool {
	raw, err := p.conn.SyscallConn()
	if err != nil {
		return true
	}
	gone := true
	if err := raw.Control(func(fd uintptr) {
		n, _, err := unix.Recvfrom(int(fd), make([]byte, 1), unix.MSG_PEEK|unix.MSG_DONTWAIT)
		gone = n <= 0 && !errors.Is(err, unix.EAGAIN)
	}); err != nil {
		return true
	}
	return gone
}

// ask sends a request, and bounds its answer.
func (p *Predecessor) ask(request byte) error {
	if err := p.conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	_, err := p.conn.Write([]byte{request})
	return err
}

// State is what the predecessor knows.
func (p *Predecessor) State() ([]byte, error) {
	if err := p.ask(askState); err != nil {
		return nil, err
	}
	var length uint64
	if err := binary.Read(p.read, binary.BigEndian, &length); err != nil {
		return nil, err
	}
	if length > maxState {
		return nil, fmt.Errorf("the predecessor knows %d bytes, more than %d", length, maxState)
	}
	state := make([]byte, length)
	_, err := io.ReadFull(p.read, state)
	return state, err
}

// Sockets are those that the predecessor accepts on, in its order. It goes on accepting until Serving.
func (p *Predecessor) Sockets() ([]*Listener, error) {
	if p.read.Buffered() > 0 {
		return nil, errors.New("the predecessor said more than it was asked for")
	}
	if err := p.ask(askSockets); err != nil {
		return nil, err
	}
	data, control := make([]byte, 1), make([]byte, unix.CmsgSpace(maxSockets*4))
	n, controls, flags, _, err := p.conn.ReadMsgUnix(data, control)
	if err != nil {
		return nil, err
	}
	messages, err := unix.ParseSocketControlMessage(control[:controls])
	if err != nil {
		return nil, err
	}
	var files []*os.File
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			continue // of another kind
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "socket"))
		}
	}
	defer func() {
		for _, f := range files {
			f.Close() // what became a listener has a descriptor of its own
		}
	}()
	if n != 1 || data[0] != askSockets || flags&unix.MSG_CTRUNC != 0 || len(files) == 0 {
		return nil, fmt.Errorf("the predecessor gave %d sockets, flags %#x", len(files), flags)
	}
	var listeners []*Listener
	for _, f := range files {
		l, err := net.FileListener(f)
		if err == nil {
			var mine *Listener
			if mine, err = newListener(l); err == nil {
				listeners = append(listeners, mine)
				continue
			}
		}
		for _, l := range listeners {
			l.Close()
		}
		return nil, fmt.Errorf("the predecessor's socket: %w", err)
	}
	return listeners, nil
}

// Serving says that the sockets are accepted on here. When it returns without an error, the predecessor accepts no more, until this
// process ends or closes p.
func (p *Predecessor) Serving() error {
	if err := p.ask(serving); err != nil {
		return err
	}
	answer, err := p.read.ReadByte()
	if err == nil && answer != serving {
		err = fmt.Errorf("the predecessor answered %#x", answer)
	}
	return errors.Join(err, p.conn.SetDeadline(time.Time{}))
}

// checkPeer returns an error where the process at the other end of a connection is of another user
// than this one (unix(7), SO_PEERCRED).
func checkPeer(c *net.UnixConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	var failed error
	if err := raw.Control(func(fd uintptr) { cred, failed = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return err
	}
	if failed != nil {
		return failed
	}
	if int(cred.Uid) != os.Geteuid() {
		return fmt.Errorf("the process at the other end is user %d's, not %d's", cred.Uid, os.Geteuid())
	}
	return nil
}
