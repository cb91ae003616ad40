package handover

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/unixsocket"
)

// Predecessor is a connection to the process that serves now, with the sockets and the state that
// this process received from it.
type Predecessor struct {
	// Sockets are those that the predecessor accepts on, by name. It continues to accept until
	// Commit.
	Sockets map[string]*Listener

	state        []byte
	stateVersion int
	conn         *net.UnixConn
}

// Dial connects to the process that serves the unix socket at path, and receives its sockets and
// its state. It returns nil and no error if there is no such process. The predecessor detects it
// when this process closes the connection or ends.
func Dial(ctx context.Context, path string) (*Predecessor, error) {
	c, err := unixsocket.Dial(ctx, path)
	if c == nil || err != nil {
		return nil, err
	}
	p := &Predecessor{conn: c}
	if err := p.receive(maxOffer); err != nil {
		p.Close()
		return nil, err
	}
	return p, nil
}

// Close closes the connection and the sockets. If the predecessor has stopped accepting, it accepts
// again.
func (p *Predecessor) Close() error {
	closeAll(p.Sockets)
	return p.conn.Close()
}

// State returns the predecessor's state, or an error if it has another version than this process's.
func (p *Predecessor) State() ([]byte, error) {
	if p.stateVersion != stateVersion {
		return nil, fmt.Errorf("the predecessor's state has version %d, not %d", p.stateVersion, stateVersion)
	}
	return p.state, nil
}

// receive requests the predecessor's offer and stores it in p. It reads at most limit bytes.
func (p *Predecessor) receive(limit int64) error {
	files, err := p.request(requestOffer)
	defer closeFiles(files) // a listener has a duplicate of the descriptor
	if err != nil {
		return err
	}
	var o offer
	if err := json.NewDecoder(io.LimitReader(p.conn, limit)).Decode(&o); err != nil {
		return fmt.Errorf("the predecessor's offer: %w", err)
	}
	if len(o.Sockets) == 0 || len(o.Sockets) != len(files) {
		return fmt.Errorf("the predecessor sent %d sockets and %d names", len(files), len(o.Sockets))
	}
	p.state, p.stateVersion, p.Sockets = o.State, o.StateVersion, make(map[string]*Listener)
	for i, name := range o.Sockets {
		l, err := newListener(net.FileListener(files[i]))
		if err != nil {
			return fmt.Errorf("the predecessor's socket %q: %w", name, err)
		}
		p.Sockets[name] = l
	}
	return nil
}

// request sends a request, and reads the first byte of its reply and the descriptors that come with
// it. The caller closes the files, also after an error.
func (p *Predecessor) request(request byte) ([]*os.File, error) {
	if err := p.conn.SetDeadline(time.Now().Add(timeout)); err != nil {
		return nil, err
	}
	if _, err := p.conn.Write([]byte{request}); err != nil {
		return nil, err
	}
	reply, control := make([]byte, 1), make([]byte, unix.CmsgSpace(maxSockets*4))
	n, controlLen, flags, _, err := p.conn.ReadMsgUnix(reply, control)
	if err != nil {
		return nil, err
	}
	files, err := filesOf(control[:controlLen])
	if err == nil && (n != 1 || reply[0] != request || flags&unix.MSG_CTRUNC != 0) {
		err = fmt.Errorf("malformed reply to the request %q, flags %#x", request, flags)
	}
	return files, err
}

// HasEndedWithin waits up to d, and reports whether the predecessor has closed the connection. The
// predecessor sends nothing unasked, so Read returns early only when the connection closes.
func (p *Predecessor) HasEndedWithin(d time.Duration) bool {
	p.conn.SetDeadline(time.Now().Add(d))
	_, err := p.conn.Read(make([]byte, 1))
	return !errors.Is(err, os.ErrDeadlineExceeded)
}

// Commit informs the predecessor that this process accepts on the sockets. When Commit returns nil,
// the predecessor has stopped accepting. It accepts again if this process ends or closes p.
func (p *Predecessor) Commit() error {
	files, err := p.request(requestCommit)
	closeFiles(files)
	return err
}

// filesOf returns the files whose descriptors are in a control message (unix(7), SCM_RIGHTS).
func filesOf(control []byte) (files []*os.File, err error) {
	messages, err := unix.ParseSocketControlMessage(control)
	for _, m := range messages {
		fds, _ := unix.ParseUnixRights(&m) // none, if it is another type of control message
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "socket"))
		}
	}
	return files, err
}

func closeFiles(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

func closeAll(listeners map[string]*Listener) {
	for _, l := range listeners {
		l.Close()
	}
}
