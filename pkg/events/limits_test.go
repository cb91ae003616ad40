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

// TestEventsOfTheNodeAreLimited refuses all pods of a node for the same reason, for ten minutes.
// Each pod gets an Event nevertheless.
func TestEventsOfTheNodeAreLimited(t *testing.T) {
	withRecorder(t, func(s *server, e *Recorder) {
		for second := range 600 {
			for i := range 250 {
				e.Warn(somePod(fmt.Sprint(i)), "IAMRoleThrottled", "no")
			}
			time.Sleep(time.Second)
			synctest.Wait()
			if least, most := 50, 51+second/2; s.created < least || s.created > most {
				t.Fatalf("%d events in %d seconds, want %d to %d", s.created, second+1, least, most)
			}
		}
		reached := map[string]bool{}
		for _, event := range s.events {
			reached[event.InvolvedObject.Name] = true
		}
		if len(reached) != 250 {
			t.Errorf("%d of 250 pods have an event", len(reached))
		}
	})
}

// TestEventsOfAPodAreLimited changes the pod's invalid annotation every second.
func TestEventsOfAPodAreLimited(t *testing.T) {
	withRecorder(t, func(s *server, e *Recorder) {
		for i := range 3600 {
			e.Warn(somePod("x"), "IAMRoleInvalid", fmt.Sprint(i))
			time.Sleep(time.Second)
		}
		synctest.Wait()
		if s.created < podBurst || s.created > podBurst+int(time.Hour/podInterval) {
			t.Errorf("%d events in an hour", s.created)
		}
		if n := e.Len(); n > s.created {
			t.Errorf("%d events are remembered", n)
		}
	})
}

// TestMemoryIsBounded records more Events than the queue and the memory hold. Warn does not block.
func TestMemoryIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := New(&server{}, "node-1", slog.New(slog.DiscardHandler)) // Run is not called
		for i := range 2 * maxRecent {
			e.Warn(somePod(fmt.Sprint(i)), "IAMRoleDenied", "no")
			time.Sleep(nodeInterval)
		}
		if len(e.queue) != maxQueue || e.Len() > maxRecent {
			t.Errorf("%d events are queued, %d remembered", len(e.queue), e.Len())
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
type hangingServer struct{ requests atomic.Int64 }

func (s *hangingServer) CreateEvent(ctx context.Context, _ *corev1.Event) (*corev1.Event, error) {
	s.requests.Add(1)
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
		if n := s.requests.Load(); n != 2 {
			t.Errorf("%d requests in fifteen seconds", n)
		}
		cancel()
		<-done
	})
}

func TestNameOfAnEventIsLimited(t *testing.T) {
	e := New(&server{}, "node-1", slog.New(slog.DiscardHandler))
	p := somePod("x")
	p.Name = strings.Repeat("x", 253)
	if name := e.newEvent(p, eventKey{}, time.Now()).Name; len(name) > 253 {
		t.Errorf("%d bytes", len(name))
	}
}
