package events

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// TestEventsOfNodeAreLimited refuses all pods of a node for ten seconds.
func TestEventsOfNodeAreLimited(t *testing.T) {
	withRecorder(t, func(s *server, e *Recorder) {
		for range 10 {
			for i := range 250 {
				e.Warn(somePod(fmt.Sprint(i)), "IAMRoleThrottled", "no")
			}
			time.Sleep(time.Second)
		}
		synctest.Wait()
		if s.created < 50 || s.created > 55 {
			t.Errorf("%d events", s.created)
		}
	})
}

func TestQueuedEventDoesNotChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := New(&server{}, "node-1", slog.New(slog.DiscardHandler)) // Run is not called
		for range 2 {
			e.Warn(somePod("x"), "IAMRoleDenied", "no")
			time.Sleep(repeatInterval)
		}
		if first, second := <-e.queue, <-e.queue; first.Count != 1 || second.Count != 2 {
			t.Errorf("%d and %d", first.Count, second.Count)
		}
	})
}

// hangingServer is an API server that never answers.
type hangingServer struct{ asked atomic.Int64 }

func (s *hangingServer) CreateEvent(ctx context.Context, _ *corev1.Event) (*corev1.Event, error) {
	s.asked.Add(1)
	<-ctx.Done()
	return nil, ctx.Err()
}

func (s *hangingServer) PatchEvent(ctx context.Context, e *corev1.Event, _ []byte) (*corev1.Event, error) {
	return s.CreateEvent(ctx, e)
}

func TestWritesTimeOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := new(hangingServer)
		e := New(s, "node-1", slog.New(slog.DiscardHandler))
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- e.Run(ctx) }()
		e.Warn(somePod("x"), "IAMRoleDenied", "no")
		e.Warn(somePod("y"), "IAMRoleDenied", "no")
		time.Sleep(15 * time.Second)
		if n := s.asked.Load(); n != 2 {
			t.Errorf("asked for %d in fifteen seconds", n)
		}
		cancel()
		<-done
	})
}

func TestFailedWriteOfForgottenEvent(t *testing.T) {
	e := New(&server{}, "node-1", slog.New(slog.DiscardHandler))
	e.Warn(somePod("x"), "IAMRoleDenied", "no")
	e.retryLater(e.newEvent(somePod("x"), eventKey{"IAMRoleDenied", "forgotten"}, time.Now()))
}

func TestNameOfEventIsLimited(t *testing.T) {
	e := New(&server{}, "node-1", slog.New(slog.DiscardHandler))
	p := somePod("x")
	p.Name = strings.Repeat("x", 253)
	if name := e.newEvent(p, eventKey{}, time.Now()).Name; len(name) > 253 {
		t.Errorf("%d bytes", len(name))
	}
}
