package pods

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/kube2iam-cni/kube2iam-cni/test/kubeapi"
)

// namespacesHarness is Namespaces over an API server.
type namespacesHarness struct {
	*Namespaces
	t       *testing.T
	api     *kubeapi.Server
	changed chan string
	changes map[string]int // the number of calls of Changed by namespace
}

func newNamespaces(t *testing.T) *namespacesHarness {
	t.Helper()
	api, client := startAPI(t)
	h := &namespacesHarness{t: t, api: api, changed: make(chan string, 4096), changes: map[string]int{}}
	h.Namespaces = NewNamespaces(NamespacesConfig{API: client, Keys: []string{"allowed", "permitted"}, Changed: func(ns string) { h.changed <- ns }, Log: slog.New(slog.DiscardHandler)})
	t.Cleanup(run(t, h.Namespaces))
	return h
}

// run runs n until the returned function is called.
func run(t *testing.T, n *Namespaces) (end func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- n.Run(ctx) }()
	return func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// namespacesOf returns Namespaces over an API that changed counts the changes of.
func namespacesOf(api API, changed func(string)) *Namespaces {
	return NewNamespaces(NamespacesConfig{API: api, Keys: []string{"allowed"}, Changed: changed, Log: slog.New(slog.DiscardHandler)})
}

func ignore(string) {}

func podIn(namespace, uid string) *Pod {
	return &Pod{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "pod-" + uid, UID: types.UID(uid)}}
}

// eventually checks again after every change.
func (h *namespacesHarness) eventually(what string, holds func() bool) {
	h.t.Helper()
	for deadline := time.After(20 * time.Second); !holds(); {
		select {
		case ns := <-h.changed:
			h.changes[ns]++
		case <-deadline:
			h.t.Fatalf("%s: never", what)
		}
	}
}

// annotations returns the annotations of a namespace that the API will show.
func (h *namespacesHarness) annotations(namespace string) (map[string]string, error) {
	h.Wait(h.t.Context(), namespace)
	return h.Annotations(namespace)
}

func (h *namespacesHarness) becomes(namespace, allowed string) {
	h.t.Helper()
	h.eventually(namespace+" becomes "+allowed, func() bool {
		got, err := h.annotations(namespace)
		return err == nil && got["allowed"] == allowed
	})
}

func TestNamespaceOfAPodIsStoredWithTheAnnotationsThatAreRead(t *testing.T) {
	h := newNamespaces(t)
	h.api.PutNamespace("team", map[string]string{"allowed": "[1]", "permitted": ".*", "other": "x"})
	h.api.PutNamespace("elsewhere", map[string]string{"allowed": "[1]"})
	h.PodChanged(podIn("team", "a"))
	if got, err := h.annotations("team"); err != nil || len(got) != 2 || got["allowed"] != "[1]" || got["permitted"] != ".*" {
		t.Errorf("%v, %v", got, err)
	}
	if !h.HasSynced() {
		t.Error("not synced")
	}
	if _, err := h.Annotations("elsewhere"); !errors.Is(err, ErrNotSynced) {
		t.Errorf("a namespace without a pod here: %v", err)
	}
	h.api.PutNamespace("team", map[string]string{"allowed": "[2]"})
	h.becomes("team", "[2]")
	h.api.PutNamespace("team", nil)
	h.becomes("team", "")
}

func TestNamespaceThatDoesNotExist(t *testing.T) {
	h := newNamespaces(t)
	h.PodChanged(podIn("nowhere", "a"))
	if _, err := h.annotations("nowhere"); !errors.Is(err, ErrNoNamespace) {
		t.Errorf("%v", err)
	}
	h.api.PutNamespace("nowhere", map[string]string{"allowed": "[]"})
	h.becomes("nowhere", "[]")
}

func TestOnlyNamespacesOfThisNodesPodsAreWatched(t *testing.T) {
	h := newNamespaces(t)
	for i := range 100 {
		h.api.PutNamespace(fmt.Sprint("team-", i), map[string]string{"allowed": "[]"})
	}
	h.PodChanged(podIn("team-1", "a"))
	h.PodChanged(podIn("team-1", "b"))
	h.PodChanged(podIn("team-2", "c"))
	host := podIn("team-3", "d")
	host.HostNetwork = true
	h.PodChanged(host)
	for _, ns := range []string{"team-1", "team-2"} {
		if _, err := h.annotations(ns); err != nil {
			t.Error(err)
		}
	}
	h.api.PutNamespace("team-50", map[string]string{"allowed": "[1]"})
	h.api.PutNamespace("team-1", map[string]string{"allowed": "[1]"})
	h.becomes("team-1", "[1]")
	requests := 0
	for r, n := range h.api.Requests() {
		if r.Resource == "namespaces" {
			requests += n
		}
	}
	if requests > 2*2 { // at most a list and a watch for each
		t.Errorf("%d requests for two namespaces", requests)
	}
	if n := h.Len(); n != 2 {
		t.Errorf("%d namespaces are watched, want 2", n)
	}
	for ns := range h.changes {
		if ns != "team-1" && ns != "team-2" {
			t.Errorf("%s is reported as changed", ns)
		}
	}
	h.PodGone(podIn("team-1", "a"))
	h.PodGone(podIn("team-1", "a"))
	if _, err := h.annotations("team-1"); err != nil {
		t.Errorf("after the first of two pods has ended: %v", err)
	}
	finished := podIn("team-1", "b")
	finished.Finished = true
	h.PodChanged(finished)
	h.PodGone(podIn("team-2", "c"))
	if n := h.Len(); n != 0 {
		t.Errorf("%d namespaces without a pod are watched", n)
	}
}

// TestChangesDuringAnOutageAreSeen loses the history of changes too, as a restart of the API server
// does.
func TestChangesDuringAnOutageAreSeen(t *testing.T) {
	h := newNamespaces(t)
	h.api.PutNamespace("team", map[string]string{"allowed": "[1]"})
	h.PodChanged(podIn("team", "a"))
	h.becomes("team", "[1]")
	h.api.Down()
	h.api.PutNamespace("team", map[string]string{"allowed": "[2]"})
	h.api.Compact()
	if err := h.api.Up(); err != nil {
		t.Fatal(err)
	}
	h.becomes("team", "[2]")
	h.api.PutNamespace("team", map[string]string{"allowed": "[3]"})
	h.becomes("team", "[3]")
}

func TestStoredNamespacesRemainDuringAnOutage(t *testing.T) {
	h := newNamespaces(t)
	h.api.PutNamespace("team", map[string]string{"allowed": "[1]"})
	h.PodChanged(podIn("team", "a"))
	h.becomes("team", "[1]")
	h.api.Down()
	h.becomes("team", "[1]")
	h.PodChanged(podIn("late", "b"))
	soon, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	h.Wait(soon, "late")
	if _, err := h.Annotations("late"); !errors.Is(err, ErrNotSynced) {
		t.Errorf("a namespace that the API server has not shown: %v", err)
	}
	if h.HasSynced() {
		t.Error("it counts as synced")
	}
}

// TestFailingWatchIsRetriedLessOften also checks that the log has one line for it.
func TestFailingWatchIsRetriedLessOften(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		api := &hangingAPI{fails: true}
		var log strings.Builder
		n := NewNamespaces(NamespacesConfig{API: api, Changed: ignore, Log: slog.New(slog.NewTextHandler(&log, nil))})
		end := run(t, n)
		n.PodChanged(podIn("team", "a"))
		time.Sleep(10 * time.Minute)
		if requests := api.follows.Load(); requests < 14 || requests > 60 {
			t.Errorf("%d requests in ten minutes", requests)
		}
		end()
		if lines := strings.Count(log.String(), "\n"); lines != 1 || !strings.Contains(log.String(), "team") {
			t.Errorf("logged %s", log.String())
		}
	})
}

// scriptedAPI reports the states of a namespace, one for each value received from next.
type scriptedAPI struct {
	hangingAPI
	states []map[string]string // nil if the namespace does not exist
	next   chan struct{}
}

func (a *scriptedAPI) FollowNamespace(ctx context.Context, _ string, report func(map[string]string, bool)) error {
	for _, s := range a.states {
		select {
		case <-a.next:
			report(s, s != nil)
		case <-ctx.Done():
			return nil
		}
	}
	<-ctx.Done()
	return nil
}

// TestOnlyChangesOfTheReadAnnotationsAreReported also checks that the new state is stored by then.
func TestOnlyChangesOfTheReadAnnotationsAreReported(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		states := []struct {
			annotations map[string]string
			isChange    bool
		}{
			{map[string]string{}, true},
			{map[string]string{"other": "x"}, false},
			{map[string]string{"allowed": "[]"}, true},
			{map[string]string{"allowed": "[]", "other": "y"}, false},
			{nil, true},
			{nil, false},
			{map[string]string{}, true},
		}
		api := &scriptedAPI{next: make(chan struct{})}
		for _, s := range states {
			api.states = append(api.states, s.annotations)
		}
		changes := 0
		var n *Namespaces
		n = namespacesOf(api, func(string) {
			changes++
			if _, err := n.Annotations("team"); errors.Is(err, ErrNotSynced) {
				t.Error(err)
			}
		})
		end := run(t, n)
		n.PodChanged(podIn("team", "a"))
		for i, s := range states {
			before := changes
			api.next <- struct{}{}
			synctest.Wait()
			if got := changes > before; got != s.isChange {
				t.Errorf("%d: reported %t", i, got)
			}
		}
		end()
	})
}

func TestWatchEndsWithTheLastPodOfItsNamespace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		api := new(hangingAPI)
		n := namespacesOf(api, ignore)
		end := run(t, n)
		n.PodChanged(podIn("team", "a"))
		time.Sleep(time.Second)
		n.PodGone(podIn("team", "a"))
		time.Sleep(time.Second)
		if watched := time.Duration(api.longest.Load()); watched != time.Second {
			t.Errorf("it was watched for %v", watched)
		}
		end()
	})
}

// TestWatchesLastFromRunToItsEnd adds pods before and after Run.
func TestWatchesLastFromRunToItsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		api := new(slowToEndAPI)
		n := namespacesOf(api, ignore)
		n.PodChanged(podIn("early", "a"))
		n.PodChanged(podIn("early-and-gone", "b"))
		n.PodGone(podIn("early-and-gone", "b"))
		synctest.Wait()
		if started := api.started.Load(); started != 0 {
			t.Errorf("%d watches before Run", started)
		}
		end := run(t, n)
		n.PodChanged(podIn("team", "c"))
		synctest.Wait()
		end()
		if started, ended := api.started.Load(), api.ended.Load(); started != 2 || ended != 2 {
			t.Errorf("%d watches have started and %d have ended, want 2", started, ended)
		}
		n.PodChanged(podIn("late", "d"))
		n.PodGone(podIn("team", "c"))
		synctest.Wait()
		if started := api.started.Load(); started != 2 {
			t.Errorf("%d watches after the end", started-2)
		}
	})
}

// slowToEndAPI is an API server whose watches of namespaces need a second to end.
type slowToEndAPI struct {
	hangingAPI
	started, ended atomic.Int64
}

func (a *slowToEndAPI) FollowNamespace(ctx context.Context, _ string, _ func(map[string]string, bool)) error {
	a.started.Add(1)
	<-ctx.Done()
	time.Sleep(time.Second)
	a.ended.Add(1)
	return nil
}
