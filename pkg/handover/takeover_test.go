package handover

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
)

func TestNoConnectionIsLostWhileSuccessorsTakeOver(t *testing.T) {
	path := socketPath(t)
	now := start(t, path, "0")
	stop := make(chan struct{})
	var clients sync.WaitGroup
	var answered atomic.Int64
	address := now.sockets["tcp"].Addr().String()
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
		next := start(t, path, fmt.Sprint(i))
		before := answered.Load()
		next.eventually("answering", func() bool { return answered.Load() >= before+20 })
		if got := next.answer(); got != fmt.Sprint(i) {
			t.Errorf("%s answers after %d took over", got, i)
		}
		now.end()
		now = next
	}
	close(stop)
	clients.Wait()
}

func TestSuccessorImportsTheState(t *testing.T) {
	path := socketPath(t)
	start(t, path, "old")
	successor := start(t, path, "new")
	if got := strings.Join(successor.imported, ", "); got != "state of old, state of old" {
		t.Errorf("imported %q, want the state at the beginning and again before the takeover", got)
	}
}

// TestSuccessorStartsColdWithoutAUsableState checks that the sockets are taken over nevertheless.
func TestSuccessorStartsColdWithoutAUsableState(t *testing.T) {
	for name, change := range map[string]func(old, successor *process){
		"unknown version": func(old, _ *process) { old.stateVersion++ },
		"unknown field": func(_, successor *process) {
			successor.Import = func([]byte) (int, error) { return 0, errors.New("unknown field") }
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := socketPath(t)
			old, successor := newProcess(t, path, "old"), newProcess(t, path, "new")
			change(old, successor)
			old.serve()
			address := old.sockets["tcp"].Addr().String()
			var log strings.Builder
			successor.Log = slog.New(slog.NewTextHandler(&log, nil))
			successor.serve()
			if got := successor.sockets["tcp"].Addr().String(); got != address {
				t.Errorf("the successor serves %s, want the predecessor's socket %s", got, address)
			}
			if got := old.answer(); got != "new" {
				t.Errorf("%s answers", got)
			}
			old.end()
			if got := successor.answer(); got != "new" {
				t.Errorf("%s answers after the predecessor has ended", got)
			}
			if len(successor.imported) > 0 {
				t.Errorf("imported %q", successor.imported)
			}
			successor.end()
			if !strings.Contains(log.String(), "starting without the credentials") {
				t.Errorf("logged %s", log.String())
			}
		})
	}
}

// TestConnectionsWaitForASuccessorThatIsNotReady ends the predecessor while its successor waits for
// its pods: the successor has the socket already.
func TestConnectionsWaitForASuccessorThatIsNotReady(t *testing.T) {
	path := socketPath(t)
	old, successor := start(t, path, "old"), newProcess(t, path, "new")
	successor.ready.Store(false)
	serving := successor.begin()
	old.end()
	c := dial(t, old.sockets["tcp"].Addr())
	if got := read(t, c); got != "new" {
		t.Errorf("%s answers", got)
	}
	<-serving
}

func TestSuccessorWaitsUntilItIsReady(t *testing.T) {
	path := socketPath(t)
	old, successor := start(t, path, "old"), newProcess(t, path, "new")
	asked := make(chan struct{}, 1)
	successor.IsReady = func() bool {
		select {
		case asked <- struct{}{}:
		default:
		}
		return successor.ready.Load()
	}
	successor.ready.Store(false)
	serving := successor.begin()
	<-asked
	<-asked
	if got := old.answer(); got != "old" || successor.IsServing() || old.isHandedOver() {
		t.Errorf("%s answers before its successor is ready", got)
	}
	successor.ready.Store(true)
	<-serving
	old.eventually("replaced", old.isHandedOver)
	if got := old.answer(); got != "new" {
		t.Errorf("%s answers", got)
	}
}

func TestPredecessorGoesOnWhenItsSuccessorDies(t *testing.T) {
	path := socketPath(t)
	old := start(t, path, "old")
	for range 3 {
		successor := start(t, path, "new")
		if got := old.answer(); got != "new" || !old.isHandedOver() {
			t.Errorf("%s answers, handed over %t", got, old.isHandedOver())
		}
		successor.end()
		if got := old.answer(); got != "old" {
			t.Errorf("%s answers", got)
		}
		old.eventually("found again", func() bool { return !old.isHandedOver() && old.isFound() })
	}
}

func TestPredecessorGoesOnWhenItsLastSuccessorDies(t *testing.T) {
	path := socketPath(t)
	old := start(t, path, "old")
	var successors []*Predecessor
	for range 2 {
		p, err := Dial(t.Context(), path)
		if err != nil || p == nil {
			t.Fatalf("%v, %v", p, err)
		}
		if err := p.Commit(); err != nil {
			t.Fatal(err)
		}
		successors = append(successors, p)
	}
	connected := func() int {
		old.Takeover.mu.Lock()
		defer old.Takeover.mu.Unlock()
		return old.successors
	}
	successors[0].Close()
	old.eventually("rid of the first", func() bool { return connected() == 1 })
	if !old.isHandedOver() {
		t.Error("it accepts although a successor serves")
	}
	successors[1].Close()
	if got := old.answer(); got != "old" {
		t.Errorf("%s answers", got)
	}
}

func TestSuccessorThatDiesBeforeItCommitsChangesNothing(t *testing.T) {
	path := socketPath(t)
	old := start(t, path, "old")
	for _, request := range []string{"", string(requestOffer), "?"} {
		p, err := Dial(t.Context(), path)
		if err != nil || p == nil {
			t.Fatalf("%v, %v", p, err)
		}
		if _, err := p.conn.Write([]byte(request)); err != nil {
			t.Error(err)
		}
		p.Close()
		if got := old.answer(); got != "old" {
			t.Errorf("%s answers", got)
		}
	}
}

// TestOptionalSockets checks that a successor serves a predecessor's socket that only Optional
// names, and starts without one that cannot be opened.
func TestOptionalSockets(t *testing.T) {
	path := socketPath(t)
	old := newProcess(t, path, "old")
	old.Sockets = append(old.Sockets, Socket{Name: "former", Address: "127.0.0.1:0"}, Socket{Name: "unused", Address: "127.0.0.1:0"})
	old.serve()
	successor := newProcess(t, path, "new")
	successor.Optional = func(inherited []string) []Socket {
		if got := strings.Join(inherited, " "); got != "former tcp unused" {
			t.Errorf("inherited %s", got)
		}
		return []Socket{{Name: "former", Address: "unused"}, {Name: "other", Address: "192.0.2.1:0"}}
	}
	successor.serve()
	if len(successor.sockets) != 2 || successor.sockets["former"].Addr().String() != old.sockets["former"].Addr().String() {
		t.Errorf("it serves %v", successor.sockets)
	}
}

// TestReplacedProcessWaitsForItsClients keeps a connection open, on which a request may be in
// transit.
func TestReplacedProcessWaitsForItsClients(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		old := New(Config{Log: slog.New(slog.DiscardHandler)})
		var open atomic.Int64
		open.Store(1)
		count := func() int { return int(open.Load()) }
		old.Drain(count) // no successor has taken over: it returns at once
		old.pause(nil)
		time.AfterFunc(5*time.Second, func() { open.Store(0) })
		start := time.Now()
		old.Drain(count)
		if d := time.Since(start); d < 5*time.Second || d > 6*time.Second {
			t.Errorf("it waited %v for a connection that was open for 5s", d)
		}
		open.Store(1)
		start = time.Now()
		old.Drain(count)
		if d := time.Since(start); d < drainTimeout || d > drainTimeout+time.Second {
			t.Errorf("it waited %v for a connection that is never closed", d)
		}
	})
}

// TestWaitForAPortIsBounded has a process without handover listen on the port.
func TestWaitForAPortIsBounded(t *testing.T) {
	l, err := Socket{Address: ":0"}.Listen(t.Context(), false)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var log strings.Builder
	successor := New(Config{
		Path: socketPath(t), Sockets: []Socket{{Name: "a", Address: l.Addr().String()}},
		Optional: func([]string) []Socket { return nil }, Log: slog.New(slog.NewTextHandler(&log, nil)),
	})
	successor.portTimeout = time.Millisecond
	if _, err := successor.Listen(t.Context()); !errors.Is(err, unix.EADDRINUSE) || !strings.Contains(err.Error(), "--state-dir") {
		t.Errorf("%v", err)
	}
	if strings.Count(log.String(), "waiting for it") != 1 {
		t.Errorf("logged %s", log.String())
	}
}
