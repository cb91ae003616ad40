package events

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/kube"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/pods"
	"github.com/kube2iam-cni/kube2iam-cni/test/kubeapi"
)

func somePod(uid string) *pods.Pod {
	return &pods.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "pod-" + uid, UID: types.UID("uid-" + uid)}}
}

// TestEventReachesTheAPIServer writes over a real socket, as the proxy does.
func TestEventReachesTheAPIServer(t *testing.T) {
	api, err := kubeapi.Start(kubeapi.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer api.Close()
	client, err := kube.New(&rest.Config{Host: api.URL(), QPS: -1})
	if err != nil {
		t.Fatal(err)
	}
	e := New(client, "node-1", slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- e.Run(ctx) }()
	p := somePod("x")
	e.Warn(p, "IAMRoleInvalid", strings.Repeat("ä", 1000))
	deadline := time.After(20 * time.Second)
	for len(api.Events()) == 0 {
		select {
		case <-time.After(10 * time.Millisecond):
		case <-deadline:
			t.Fatal("no event")
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	got := api.Events()[0]
	if got.Namespace != "default" || got.InvolvedObject.Name != "pod-x" || got.InvolvedObject.UID != p.UID || got.InvolvedObject.Kind != "Pod" ||
		got.Type != corev1.EventTypeWarning || got.Reason != "IAMRoleInvalid" || got.Source.Component != "kube2iam-cni" || got.Source.Host != "node-1" ||
		len(got.Message) > 1024 || !strings.HasSuffix(got.Message, "ä...") {
		t.Errorf("%+v", got)
	}
}

// server is an API server in memory.
type server struct {
	events  map[string]*corev1.Event
	created int
	patched int
	err     error
}

func (s *server) CreateEvent(_ context.Context, e *corev1.Event) (*corev1.Event, error) {
	s.created++
	s.events[e.Name] = e
	return e, s.err
}

func (s *server) PatchEvent(_ context.Context, e *corev1.Event, patch []byte) (*corev1.Event, error) {
	s.patched++
	known := s.events[e.Name]
	if known == nil {
		return nil, apierrors.NewNotFound(corev1.Resource("events"), e.Name)
	}
	changed := known.DeepCopy()
	if err := json.Unmarshal(patch, changed); err != nil {
		return nil, err
	}
	s.events[e.Name] = changed
	return changed, nil
}

// withRecorder calls test while Run writes Events.
func withRecorder(t *testing.T, test func(s *server, e *Recorder)) {
	synctest.Test(t, func(t *testing.T) {
		s := &server{events: map[string]*corev1.Event{}}
		e := New(s, "node-1", slog.New(slog.DiscardHandler))
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- e.Run(ctx) }()
		test(s, e)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestRepetitionsAreCounted(t *testing.T) {
	withRecorder(t, func(s *server, e *Recorder) {
		for range 100 {
			e.Warn(somePod("x"), "IAMRoleDenied", "no")
			time.Sleep(time.Second)
		}
		synctest.Wait()
		if s.created != 1 || s.patched != 0 {
			t.Errorf("%d equal events in a hundred seconds, %d patches", s.created, s.patched)
		}
		for range 3 {
			time.Sleep(repeatInterval)
			e.Warn(somePod("x"), "IAMRoleDenied", "no")
			synctest.Wait()
		}
		for _, event := range s.events {
			if age := event.LastTimestamp.Sub(event.FirstTimestamp.Time); event.Count != 4 || age < 3*repeatInterval || s.created != 1 {
				t.Errorf("%d, the last after %v, of %d events", event.Count, age, s.created)
			}
		}
		clear(s.events) // expired
		time.Sleep(repeatInterval)
		e.Warn(somePod("x"), "IAMRoleDenied", "no")
		synctest.Wait()
		if len(s.events) != 1 {
			t.Error("not created again")
		}
		e.PodGone(somePod("x"))
		if e.Len() > 0 {
			t.Error("a deleted pod is remembered")
		}
	})
}

func TestEventThatIsNotWrittenIsRecordedWithItsRepetition(t *testing.T) {
	withRecorder(t, func(s *server, e *Recorder) {
		s.err = errors.New("down")
		e.Warn(somePod("x"), "IAMRoleDenied", "no")
		synctest.Wait()
		s.err = nil
		clear(s.events)
		time.Sleep(repeatInterval)
		e.Warn(somePod("x"), "IAMRoleDenied", "no")
		synctest.Wait()
		if len(s.events) != 1 || s.created != 2 {
			t.Errorf("%d events after %d attempts", len(s.events), s.created)
		}
	})
}

func TestPodsHaveSeparateEvents(t *testing.T) {
	withRecorder(t, func(s *server, e *Recorder) {
		e.Warn(somePod("x"), "IAMRoleDenied", "no")
		e.Warn(somePod("y"), "IAMRoleDenied", "no")
		e.Warn(somePod("y"), "IAMRoleInvalid", "no")
		synctest.Wait()
		if len(s.events) != 3 {
			t.Errorf("%d events, want 3", len(s.events))
		}
	})
}

// TestFailedWriteIsRetried has a write fail because the API server is down, then because the queue is
// full. The first repetition after a minute is written, with the count of those that were written.
func TestFailedWriteIsRetried(t *testing.T) {
	withRecorder(t, func(s *server, e *Recorder) {
		s.err = errors.New("down")
		warn := func() {
			e.Warn(somePod("x"), "IAMRoleDenied", "no")
			synctest.Wait()
		}
		warn()
		warn() // too early
		if s.created != 1 {
			t.Errorf("%d tries, want 1", s.created)
		}
		s.err = nil
		clear(s.events)
		time.Sleep(retryInterval)
		warn()
		time.Sleep(retryInterval)
		warn()
		if len(s.events) != 1 || s.created != 2 {
			t.Errorf("%d events by %d tries, want 1 by 2", len(s.events), s.created)
		}
		for _, event := range s.events {
			if event.Count != 1 {
				t.Errorf("the count is %d, want 1", event.Count)
			}
		}
	})
	synctest.Test(t, func(t *testing.T) {
		e := New(&server{}, "node-1", slog.New(slog.DiscardHandler)) // Run is not called
		for range maxQueue {
			e.queue <- new(corev1.Event)
		}
		e.Warn(somePod("x"), "IAMRoleDenied", "no")
		<-e.queue
		time.Sleep(retryInterval)
		e.Warn(somePod("x"), "IAMRoleDenied", "no")
		if len(e.queue) != maxQueue {
			t.Error("an Event that did not fit in the queue is not retried")
		}
	})
}
