package pods

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/kube"
	"github.com/kube2iam-cni/kube2iam-cni/test/kubeapi"
)

// spaces is the watch of the namespaces of some pods, over a stand-in API server.
type spaces struct {
	*Namespaces
	t       *testing.T
	api     *kubeapi.Server
	changed chan string
	told    map[string]int
}

func newSpaces(t *testing.T) *spaces {
	t.Helper()
	api, err := kubeapi.Start(kubeapi.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(api.Close)
	client, err := kube.New(&rest.Config{Host: api.URL(), QPS: -1})
	if err != nil {
		t.Fatal(err)
	}
	s := &spaces{t: t, api: api, changed: make(chan string, 4096), told: map[string]int{}}
	s.Namespaces = NewNamespaces(NamespacesConfig{API: client, Keys: []string{"allowed", "permitted"}, Changed: func(ns string) { s.changed <- ns }, Log: slog.New(slog.DiscardHandler)})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return s
}

func in(namespace, uid string) *Pod {
	return &Pod{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "pod-" + uid, UID: types.UID(uid)}}
}

// eventually looks again at every change.
func (s *spaces) eventually(what string, holds func() bool) {
	s.t.Helper()
	for deadline := time.After(20 * time.Second); !holds(); {
		select {
		case ns := <-s.changed:
			s.told[ns]++
		case <-deadline:
			s.t.Fatalf("%s: never", what)
		}
	}
}

func TestNamespaceOfAPodIsKnownWithTheAnnotationsThatAreRead(t *testing.T) {
	s := newSpaces(t)
	s.api.PutNamespace("team", map[string]string{"allowed": "[1]", "permitted": ".*", "other": "x"})
	s.api.PutNamespace("elsewhere", map[string]string{"allowed": "[1]"})
	s.PodChanged(in("team", "a"))
	if got, err := s.Annotations(t.Context(), "team"); err != nil || len(got) != 2 || got["allowed"] != "[1]" || got["permitted"] != ".*" {
		t.Errorf("%v, %v", got, err)
	}
	if !s.Shown() {
		t.Error("what has been told is not shown")
	}
	ended, end := context.WithCancel(t.Context())
	end()
	if _, err := s.Annotations(ended, "elsewhere"); !errors.Is(err, ErrNotShown) {
		t.Errorf("a namespace without a pod here: %v", err)
	}
	s.api.PutNamespace("team", map[string]string{"allowed": "[2]"})
	s.eventually("the change", func() bool {
		got, err := s.Annotations(t.Context(), "team")
		return err == nil && len(got) == 1 && got["allowed"] == "[2]"
	})
	s.api.PutNamespace("team", nil)
	s.eventually("the annotation is taken away", func() bool {
		got, err := s.Annotations(t.Context(), "team")
		return err == nil && len(got) == 0
	})
}

func TestNamespaceThatDoesNotExistIsSaidToBeSo(t *testing.T) {
	s := newSpaces(t)
	s.PodChanged(in("nowhere", "a"))
	if _, err := s.Annotations(t.Context(), "nowhere"); !errors.Is(err, ErrNoNamespace) {
		t.Errorf("%v", err)
	}
	s.api.PutNamespace("nowhere", map[string]string{"allowed": "[]"})
	s.eventually("it is made", func() bool {
		_, err := s.Annotations(t.Context(), "nowhere")
		return err == nil
	})
}

// TestOnlyNamespacesOfThisNodesPodsAreWatched has a cluster with many, of which this node has few, that come and go.
func TestOnlyNamespacesOfThisNodesPodsAreWatched(t *testing.T) {
	s := newSpaces(t)
	for i := range 100 {
		s.api.PutNamespace(fmt.Sprint("team-", i), map[string]string{"allowed": "[]"})
	}
	s.PodChanged(in("team-1", "a"))
	s.PodChanged(in("team-1", "b"))
	s.PodChanged(in("team-2", "c"))
	host := in("team-3", "d")
	host.HostNetwork = true
	s.PodChanged(host)
	for _, ns := range []string{"team-1", "team-2"} {
		if _, err := s.Annotations(t.Context(), ns); err != nil {
			t.Error(err)
		}
	}
	s.api.PutNamespace("team-50", map[string]string{"allowed": "[1]"})
	s.api.PutNamespace("team-1", map[string]string{"allowed": "[1]"})
	s.eventually("the change", func() bool {
		got, err := s.Annotations(t.Context(), "team-1")
		return err == nil && got["allowed"] == "[1]"
	})
	asked := 0
	for r, n := range s.api.Requests() {
		if r.Resource == "namespaces" {
			asked += n
		}
	}
	if asked > 2*2 { // a list and a watch, where one does not do for both
		t.Errorf("the API server was asked %d times for two namespaces", asked)
	}
	if n := s.Len(); n != 2 {
		t.Errorf("%d namespaces are watched, want 2", n)
	}
	for ns := range s.told {
		if ns != "team-1" && ns != "team-2" {
			t.Errorf("told of %s", ns)
		}
	}
	s.PodGone(in("team-1", "a"))
	s.PodGone(in("team-1", "a"))
	if _, err := s.Annotations(t.Context(), "team-1"); err != nil {
		t.Errorf("gone with the first of its pods: %v", err)
	}
	finished := in("team-1", "b")
	finished.Finished = true
	s.PodChanged(finished)
	s.PodGone(in("team-2", "c"))
	if n := s.Len(); n != 0 {
		t.Errorf("%d namespaces are watched for nobody", n)
	}
}

// TestChangesOfANamespaceAreSeenAfterItsWatchBroke has it break off, and the changes since forgotten, as a restart of the API server does.
func TestChangesOfANamespaceAreSeenAfterItsWatchBroke(t *testing.T) {
	s := newSpaces(t)
	s.api.PutNamespace("team", map[string]string{"allowed": "[1]"})
	s.PodChanged(in("team", "a"))
	if _, err := s.Annotations(t.Context(), "team"); err != nil {
		t.Fatal(err)
	}
	s.api.Down()
	s.api.PutNamespace("team", map[string]string{"allowed": "[2]"})
	s.api.Compact()
	if err := s.api.Up(); err != nil {
		t.Fatal(err)
	}
	s.eventually("the change in between", func() bool {
		got, err := s.Annotations(t.Context(), "team")
		return err == nil && got["allowed"] == "[2]"
	})
	s.api.PutNamespace("team", map[string]string{"allowed": "[3]"})
	s.eventually("the change after that", func() bool {
		got, err := s.Annotations(t.Context(), "team")
		return err == nil && got["allowed"] == "[3]"
	})
}

func TestKnownNamespacesOutliveTheAPIServer(t *testing.T) {
	s := newSpaces(t)
	s.api.PutNamespace("team", map[string]string{"allowed": "[1]"})
	s.PodChanged(in("team", "a"))
	if _, err := s.Annotations(t.Context(), "team"); err != nil {
		t.Fatal(err)
	}
	s.api.Down()
	if got, err := s.Annotations(t.Context(), "team"); err != nil || got["allowed"] != "[1]" {
		t.Errorf("%v, %v", got, err)
	}
	s.PodChanged(in("late", "b"))
	soon, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := s.Annotations(soon, "late"); !errors.Is(err, ErrNotShown) {
		t.Errorf("a namespace that nobody can show: %v", err)
	}
	if s.Shown() {
		t.Error("it counts as shown")
	}
}
