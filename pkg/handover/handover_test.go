package handover

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// process answers each connection with its name, as one that hands over would.
type process struct {
	*Server
	t    *testing.T
	name string
	from *Predecessor
	end  func()
}

// begin has a process serve: on sockets of its own where there is no predecessor.
func begin(t *testing.T, path, name string) *process {
	t.Helper()
	p := &process{t: t, name: name, Server: &Server{
		checkInterval: 20 * time.Millisecond, Path: path, State: func() ([]byte, error) { return []byte("known to " + name), nil }, Log: slog.New(slog.DiscardHandler),
	}}
	var err error
	if p.from, err = Dial(t.Context(), path); err != nil {
		t.Fatal(err)
	}
	if p.from == nil {
		l, err := Listen(t.Context(), "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		p.Sockets = map[string]*Listener{"tcp": l}
	} else if p.Sockets, err = p.from.Sockets(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		for {
			c, err := p.Sockets["tcp"].Accept()
			if err != nil {
				return
			}
			io.WriteString(c, name)
			c.Close()
		}
	})
	if p.from != nil {
		if err := p.from.Commit(); err != nil {
			t.Fatal(err)
		}
	}
	running.Go(func() {
		if err := p.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	p.end = sync.OnceFunc(func() {
		cancel()
		p.Sockets["tcp"].Close()
		if p.from != nil {
			p.from.Close()
		}
		running.Wait()
	})
	t.Cleanup(p.end)
	p.eventually("found at the path", func() bool {
		found, err := Dial(t.Context(), path)
		if found == nil || err != nil {
			return false
		}
		defer found.Close()
		state, err := found.State()
		return err == nil && string(state) == "known to "+name
	})
	return p
}

func (p *process) eventually(what string, holds func() bool) {
	p.t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !holds(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			p.t.Fatalf("%s: never %s", p.name, what)
		}
	}
}

// answers is who answers a connection.
func (p *process) answers() string {
	p.t.Helper()
	c, err := net.Dial("tcp", p.Sockets["tcp"].Addr().String())
	if err != nil {
		p.t.Fatalf("nobody listens: %v", err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	name, err := io.ReadAll(c)
	if err != nil {
		p.t.Fatalf("nobody answers: %v", err)
	}
	return string(name)
}

// TestProcessThatServesIsFoundAgain has its socket be removed, and be left behind by another that took it and died.
func TestProcessThatServesIsFoundAgain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "handover.sock")
	p := begin(t, path, "a")
	found := func() bool {
		at, err := Dial(t.Context(), path)
		if at == nil || err != nil {
			return false
		}
		defer at.Close()
		state, err := at.State()
		return err == nil && string(state) == "known to a"
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	p.eventually("found after its socket was removed", found)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path + ".x", Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	if err := errors.Join(os.Rename(path+".x", path), l.Close()); err != nil {
		t.Fatal(err)
	}
	p.eventually("found after another's socket was left there", found)
}

func TestSuccessorsTakeOverWithoutAnUnansweredConnection(t *testing.T) {
	path := filepath.Join(t.TempDir(), "handover.sock")
	now := begin(t, path, "0")
	stop := make(chan struct{})
	var clients sync.WaitGroup
	var answered atomic.Int64
	address := now.Sockets["tcp"].Addr().String()
	for range 4 {
		clients.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				c, err := net.Dial("tcp", address)
				if err != nil {
					t.Errorf("refused: %v", err)
					return
				}
				c.SetDeadline(time.Now().Add(10 * time.Second))
				if name, err := io.ReadAll(c); err != nil || len(name) == 0 {
					t.Errorf("not answered: %q, %v", name, err)
				}
				c.Close()
				answered.Add(1)
			}
		})
	}
	for i := 1; i <= 20; i++ {
		next := begin(t, path, fmt.Sprint(i))
		for before := answered.Load(); answered.Load() < before+20; { // some under each
			time.Sleep(time.Millisecond)
		}
		if got := next.answers(); got != fmt.Sprint(i) {
			t.Errorf("%s answers after %d took over", got, i)
		}
		now.end()
		now = next
	}
	close(stop)
	clients.Wait()
}

func TestPredecessorGoesOnWhenItsSuccessorDies(t *testing.T) {
	path := filepath.Join(t.TempDir(), "handover.sock")
	old := begin(t, path, "old")
	var handed atomic.Int64
	old.OnChange = func(yes bool) {
		if yes {
			handed.Add(1)
		} else {
			handed.Add(-1)
		}
	}
	for range 3 {
		successor := begin(t, path, "new")
		if got := old.answers(); got != "new" || handed.Load() != 1 {
			t.Errorf("%s answers, handed %d", got, handed.Load())
		}
		successor.end()
		if got := old.answers(); got != "old" {
			t.Errorf("%s answers", got)
		}
		old.eventually("back", func() bool {
			found, err := Dial(t.Context(), path)
			if found == nil || err != nil {
				return false
			}
			defer found.Close()
			return handed.Load() == 0
		})
	}
}

// TestSuccessorThatDiesBeforeItServesChangesNothing has it take the sockets, and no more.
func TestSuccessorThatDiesBeforeItServesChangesNothing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "handover.sock")
	old := begin(t, path, "old")
	for _, steps := range []func(*Predecessor) error{
		func(*Predecessor) error { return nil },
		func(p *Predecessor) error { _, err := p.State(); return err },
		func(p *Predecessor) error {
			sockets, err := p.Sockets()
			for _, l := range sockets {
				l.Close()
			}
			return err
		},
		func(p *Predecessor) error { _, err := p.conn.Write([]byte("?")); return err },
	} {
		p, err := Dial(t.Context(), path)
		if err != nil || p == nil {
			t.Fatalf("%v, %v", p, err)
		}
		if err := steps(p); err != nil {
			t.Error(err)
		}
		p.Close()
		if got := old.answers(); got != "old" {
			t.Errorf("%s answers", got)
		}
	}
}

func TestNobodyIsFoundWhereNobodyServes(t *testing.T) {
	path := filepath.Join(t.TempDir(), "handover.sock")
	if p, err := Dial(t.Context(), path); p != nil || err != nil {
		t.Errorf("nothing there: %v, %v", p, err)
	}
	begin(t, path, "dead").end()
	if p, err := Dial(t.Context(), path); p != nil || err != nil {
		t.Errorf("one that ended: %v, %v", p, err)
	}
}

// TestWrongAnswersAreRefused has somebody at the path who is no proxy.
func TestWrongAnswersAreRefused(t *testing.T) {
	for name, c := range map[string]struct {
		answer string
		ask    func(*Predecessor) error
	}{
		"it ends":           {"", func(p *Predecessor) error { _, err := p.State(); return err }},
		"it knows too much": {"c\xff\xff\xff\xff\xff\xff\xff\xff", func(p *Predecessor) error { _, err := p.State(); return err }},
		"no socket comes":   {"s\x00\x00\x00\x00\x00\x00\x00\x05[\"a\"]", func(p *Predecessor) error { _, err := p.Sockets(); return err }},
		"another version":   {"c\x00\x00\x00\x00\x00\x00\x00\x03\x02{}", func(p *Predecessor) error { _, err := p.State(); return err }},
		"it does not stop":  {"x", func(p *Predecessor) error { return p.Commit() }},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "handover.sock")
			l, err := net.Listen("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			go func() {
				conn, err := l.Accept()
				if errors.Is(err, net.ErrClosed) {
					return
				}
				defer conn.Close()
				conn.Read(make([]byte, 1))
				io.WriteString(conn, c.answer)
			}()
			p, err := Dial(t.Context(), path)
			if err != nil {
				t.Fatal(err)
			}
			defer p.Close()
			if err := c.ask(p); err == nil {
				t.Error("no error")
			}
		})
	}
}

// TestListenWithoutMPTCP has a client ask for MPTCP: it is served by TCP, whose socket options the proxy needs.
func TestListenWithoutMPTCP(t *testing.T) {
	l, err := Listen(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var d net.Dialer
	d.SetMultipathTCP(true)
	client, err := d.DialContext(t.Context(), "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if multipath, err := c.(*net.TCPConn).MultipathTCP(); multipath || err != nil {
		t.Errorf("MPTCP: %t, %v", multipath, err)
	}
}
