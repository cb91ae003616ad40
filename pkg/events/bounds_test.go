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

// TestNodeHasItsShareOfEvents is the first ten seconds of what all pods of a node hear at once.
func TestNodeHasItsShareOfEvents(t *testing.T) {
	writing(t, func(s *server, e *Events) {
		for range 10 {
			for i := range 250 {
				e.Refused(somePod(fmt.Sprint(i)), "IAMRoleThrottled", "no")
			}
			time.Sleep(time.Second)
		}
		synctest.Wait()
		if s.created < 50 || s.created > 55 {
			t.Errorf("%d events", s.created)
		}
	})
}

func TestEventThatWaitsIsNotCountedUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := New(&server{}, "node-1", slog.New(slog.DiscardHandler)) // nobody writes
		for range 2 {
			e.Refused(somePod("x"), "IAMRoleDenied", "no")
			time.Sleep(pause)
		}
		if first, second := <-e.queue, <-e.queue; first.event.Count != 1 || second.event.Count != 2 {
			t.Errorf("%d and %d", first.event.Count, second.event.Count)
		}
	})
}

// hangingServer is an API server that answers nothing.
type hangingServer struct{ asked atomic.Int64 }

func (s *hangingServer) CreateEvent(ctx context.Context, _ *corev1.Event) (*corev1.Event, error) {
	s.asked.Add(1)
	<-ctx.Done()
	return nil, ctx.Err()
}

func (s *hangingServer) PatchEvent(ctx context.Context, e *corev1.Event, _ []byte) (*corev1.Event, error) {
	return s.CreateEvent(ctx, e)
}

func TestEventThatHangsHoldsUpTheNextForAWhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := new(hangingServer)
		e := New(s, "node-1", slog.New(slog.DiscardHandler))
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- e.Run(ctx) }()
		e.Refused(somePod("x"), "IAMRoleDenied", "no")
		e.Refused(somePod("y"), "IAMRoleDenied", "no")
		time.Sleep(15 * time.Second)
		if n := s.asked.Load(); n != 2 {
			t.Errorf("asked for %d in fifteen seconds", n)
		}
		cancel()
		<-done
	})
}

func TestLostSayingThatIsForgottenHarmsNobody(t *testing.T) {
	e := New(&server{}, "node-1", slog.New(slog.DiscardHandler))
	e.Refused(somePod("x"), "IAMRoleDenied", "no")
	e.lost(queued{e.event(somePod("x"), saying{}, time.Now()), saying{"IAMRoleDenied", "forgotten"}})
}

func TestEventOfALongNameHasAName(t *testing.T) {
	e := New(&server{}, "node-1", slog.New(slog.DiscardHandler))
	p := somePod("x")
	p.Name = strings.Repeat("x", 253)
	if name := e.event(p, saying{}, time.Now()).Name; len(name) > 253 {
		t.Errorf("%d bytes", len(name))
	}
}
