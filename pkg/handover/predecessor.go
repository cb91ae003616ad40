package handover

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/unixsocket"
)

// Predecessor is a connection to the process that serves now.
type Predecessor struct{ conn *net.UnixConn }

// Dial connects to the process that serves the unix socket at path. It returns nil and no error if
// there is none. The predecessor notices when its successor closes the connection, or ends.
func Dial(ctx context.Context, path string) (*Predecessor, error) {
	c, err := unixsocket.Dial(ctx, path)
	if c == nil || err != nil {
		return nil, err
	}
	return &Predecessor{c}, nil
}

// Close closes the connection. A predecessor that has stopped accepting accepts again.
func (p *Predecessor) Close() error { return p.conn.Close() }

// HasEnded reports whether the predecessor has closed the connection. It sends only what it is asked for.
func (p *Predecessor) HasEnded() bool {
	raw, err := p.conn.SyscallConn()
	if err != nil {
		return true
	}
	ended := true
	err = raw.Control(func(fd uintptr) {
		n, _, err := unix.Recvfrom(int(fd), make([]byte, 1), unix.MSG_PEEK|unix.MSG_DONTWAIT)
		ended = n <= 0 && !errors.Is(err, unix.EAGAIN)
	})
	return ended || err != nil
}

// request sends a request and reads its reply. The caller closes the files, also after an error.
func (p *Predecessor) request(request byte) ([]byte, []*os.File, error) {
	if err := p.conn.SetDeadline(time.Now().Add(timeout)); err != nil {
		return nil, nil, err
	}
	if _, err := p.conn.Write([]byte{request}); err != nil {
		return nil, nil, err
	}
	payload, files, err := readReply(p.conn, request)
	return payload, files, errors.Join(err, p.conn.SetDeadline(time.Time{}))
}

// State returns the predecessor's state. It is an error if the state has another version.
func (p *Predecessor) State() ([]byte, error) {
	payload, files, err := p.request(requestState)
	closeFiles(files)
	if err != nil {
		return nil, err
	}
	if len(payload) == 0 || payload[0] != stateVersion {
		return nil, fmt.Errorf("the predecessor's state does not have version %d", stateVersion)
	}
	return payload[1:], nil
}

// Sockets returns the sockets that the predecessor accepts on, by name. It goes on accepting until
// Commit.
func (p *Predecessor) Sockets() (map[string]*Listener, error) {
	payload, files, err := p.request(requestSockets)
	defer closeFiles(files) // a listener has a duplicate of the descriptor
	if err != nil {
		return nil, err
	}
	var names []string
	if err := json.Unmarshal(payload, &names); err != nil {
		return nil, fmt.Errorf("names of the predecessor's sockets: %w", err)
	}
	if len(names) == 0 || len(names) != len(files) {
		return nil, fmt.Errorf("the predecessor sent %d sockets and %d names", len(files), len(names))
	}
	listeners := make(map[string]*Listener, len(names))
	for i, name := range names {
		l, err := fileListener(files[i])
		if _, exists := listeners[name]; err == nil && exists {
			l.Close()
			err = errors.New("another socket has the same name")
		}
		if err != nil {
			closeAll(listeners)
			return nil, fmt.Errorf("the predecessor's socket %q: %w", name, err)
		}
		listeners[name] = l
	}
	return listeners, nil
}

// Commit tells the predecessor that this process accepts on the sockets. When it returns without an
// error, the predecessor has stopped accepting, until this process ends or closes p.
func (p *Predecessor) Commit() error {
	_, files, err := p.request(requestCommit)
	closeFiles(files)
	return err
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
