package handover

import (
	"context"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// process is a process that serves one socket and answers each connection with its name.
type process struct {
	*Takeover
	t       *testing.T
	name    string
	ready   atomic.Bool
	sockets map[string]*Listener
	end     func()

	mu       sync.Mutex
	imported []string
}

// newProcess returns a process that is ready, but has not begun.
func newProcess(t *testing.T, path, name string) *process {
	p := &process{t: t, name: name}
	p.ready.Store(true)
	p.Takeover = New(Config{
		Path: path, Sockets: []Socket{{Name: "tcp", Address: "127.0.0.1:0"}},
		Optional: func([]string) []Socket { return nil },
		Import: func(state []byte) (int, error) {
			p.mu.Lock()
			defer p.mu.Unlock()
			p.imported = append(p.imported, string(state))
			return 1, nil
		},
		Export:  func() ([]byte, error) { return []byte("state of " + name), nil },
		IsReady: p.ready.Load, Pending: func() int { return 0 }, Log: slog.New(slog.DiscardHandler),
	})
	p.checkInterval = 20 * time.Millisecond
	return p
}

// begin begins, and serves when the process has the socket. The returned channel is closed then.
func (p *process) begin() <-chan struct{} {
	p.t.Helper()
	p.Begin(p.t.Context())
	ctx, cancel := context.WithCancel(context.Background())
	serving := make(chan struct{})
	var running sync.WaitGroup
	running.Go(func() {
		var err error
		if p.sockets, err = p.Listen(ctx); err != nil {
			p.t.Error(err)
		}
		if p.sockets == nil {
			return
		}
		running.Go(func() {
			for c, err := p.sockets["tcp"].Accept(); err == nil; c, err = p.sockets["tcp"].Accept() {
				io.WriteString(c, p.name)
				c.Close()
			}
		})
		close(serving)
		if err := p.Serve(ctx, p.sockets); err != nil {
			p.t.Error(err)
		}
	})
	p.end = sync.OnceFunc(func() {
		cancel()
		closeAll(p.sockets)
		running.Wait()
		p.Close()
	})
	p.t.Cleanup(p.end)
	return serving
}

// start returns a process that serves and that successors find.
func start(t *testing.T, path, name string) *process {
	t.Helper()
	p := newProcess(t, path, name)
	p.serve()
	return p
}

// serve begins and waits until the process serves and successors find it.
func (p *process) serve() {
	p.t.Helper()
	<-p.begin()
	p.eventually("found at the path", p.isFound)
}

// isFound reports whether a successor finds this process.
func (p *process) isFound() bool {
	found, err := Dial(p.t.Context(), p.Path)
	if found == nil || err != nil {
		return false
	}
	defer found.Close()
	return string(found.state) == "state of "+p.name
}

func (p *process) eventually(what string, holds func() bool) {
	p.t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !holds(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			p.t.Fatalf("%s: never %s", p.name, what)
		}
	}
}

// answer dials the process's socket and returns the name of the process that answers.
func (p *process) answer() string {
	p.t.Helper()
	return read(p.t, dial(p.t, p.sockets["tcp"].Addr()))
}

func dial(t *testing.T, address net.Addr) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", address.String())
	if err != nil {
		t.Fatalf("no process listens: %v", err)
	}
	return c
}

func read(t *testing.T, c net.Conn) string {
	t.Helper()
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	name, err := io.ReadAll(c)
	if err != nil {
		t.Fatalf("no process answers: %v", err)
	}
	return string(name)
}

func socketPath(t *testing.T) string { return filepath.Join(t.TempDir(), "handover.sock") }
