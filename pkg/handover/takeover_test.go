package handover

import (
	"errors"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
)

// TestReplacedProcessWaitsForItsClients has a client keep a connection open, on which a request may be in
// transit.
func TestReplacedProcessWaitsForItsClients(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		old := New(Config{Log: slog.New(slog.DiscardHandler)})
		var open atomic.Int64
		open.Store(1)
		count := func() int { return int(open.Load()) }
		old.Drain(count) // no successor has taken over: it returns at once
		old.handedOver.Store(true)
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

// TestPortOfAnotherProcessIsNotWaitedForForever has a process that does not hand over have the port.
func TestPortOfAnotherProcessIsNotWaitedForForever(t *testing.T) {
	l, err := Listen(t.Context(), ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var log strings.Builder
	successor := New(Config{
		Path: t.TempDir() + "/handover.sock", Sockets: []Socket{{Name: "a", Address: l.Addr().String()}},
		Log: slog.New(slog.NewTextHandler(&log, nil)),
	})
	successor.portTimeout = time.Millisecond
	if _, err := successor.Listen(t.Context()); !errors.Is(err, unix.EADDRINUSE) || !strings.Contains(err.Error(), "--state-dir") {
		t.Errorf("%v", err)
	}
	if strings.Count(log.String(), "waiting for it") != 1 {
		t.Errorf("logged %s", log.String())
	}
}
