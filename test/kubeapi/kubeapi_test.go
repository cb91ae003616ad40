package kubeapi

import (
	"bufio"
	"context"
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
)

func start(t *testing.T, o Options) *Server {
	t.Helper()
	s, err := Start(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func client(t *testing.T, config *rest.Config) kubernetes.Interface {
	t.Helper()
	config.QPS = -1
	c, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// seen records the calls of an informer's handler.
type seen struct{ what, name, ip string }

// inform runs client-go's own informer on node1's pods and tells what its handler gets.
func inform(t *testing.T, s *Server) <-chan seen {
	t.Helper()
	factory := informers.NewSharedInformerFactoryWithOptions(client(t, &rest.Config{Host: s.URL()}), 0,
		informers.WithTweakListOptions(func(o *metav1.ListOptions) { o.FieldSelector = "spec.nodeName=node1" }))
	out := make(chan seen, 100)
	tell := func(what string, obj any) {
		if d, ok := obj.(cache.DeletedFinalStateUnknown); ok {
			obj = d.Obj
		}
		pod := obj.(*corev1.Pod)
		out <- seen{what, pod.Name, pod.Status.PodIP}
	}
	factory.Core().V1().Pods().Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(obj any) { tell("add", obj) },
		UpdateFunc: func(_, obj any) { tell("update", obj) },
		DeleteFunc: func(obj any) { tell("delete", obj) },
	})
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(func() { cancel(); factory.Shutdown() })
	factory.Start(ctx.Done())
	return out
}

func expect(t *testing.T, from <-chan seen, want ...seen) {
	t.Helper()
	deadline := time.After(20 * time.Second)
	var got []seen
	for len(got) < len(want) {
		select {
		case s := <-from:
			got = append(got, s)
		case <-deadline:
			t.Fatalf("the informer said no more than %v, want %v", got, want)
		}
	}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(seen{})); diff != "" {
		t.Fatalf("from the informer (-want +got):\n%s", diff)
	}
}

// TestInformer follows pods with client-go's informer in both of its ways to begin: the streaming
// list that is its default, and a list and a watch.
func TestInformer(t *testing.T) {
	for _, mode := range []struct{ name, gate, verb string }{{"streaming list", "true", "watch"}, {"list and watch", "false", "list"}} {
		t.Run(mode.name, func(t *testing.T) {
			t.Setenv("KUBE_FEATURE_WatchListClient", mode.gate)
			s := start(t, Options{})
			s.PutPod(NewRunningPod("node1", "default", "a", nil, "10.0.0.1"))
			s.PutPod(NewRunningPod("node2", "default", "elsewhere", nil, "10.0.1.1"))
			got := inform(t, s)
			expect(t, got, seen{"add", "a", "10.0.0.1"})

			s.PutPod(NewPod("node1", "team", "b", nil))
			if err := s.SetStatus("team", "b", corev1.PodRunning, "10.0.0.2", "fd00::2"); err != nil {
				t.Fatal(err)
			}
			if err := s.DeletePod("default", "a"); err != nil {
				t.Fatal(err)
			}
			expect(t, got, seen{"add", "b", ""}, seen{"update", "b", "10.0.0.2"}, seen{"delete", "a", "10.0.0.1"})

			// A watch that breaks off is begun again where it was: nothing is told twice.
			s.SendBookmarks()
			s.DropWatches()
			s.PutPod(NewRunningPod("node1", "default", "c", nil, "10.0.0.3"))
			expect(t, got, seen{"add", "c", "10.0.0.3"})
		})
	}
}

func TestInformerOutlivesOutage(t *testing.T) {
	for _, mode := range []struct{ name, gate string }{{"streaming list", "true"}, {"list and watch", "false"}} {
		t.Run(mode.name, func(t *testing.T) {
			t.Setenv("KUBE_FEATURE_WatchListClient", mode.gate)
			s := start(t, Options{})
			s.PutPod(NewRunningPod("node1", "default", "stays", nil, "10.0.0.1"))
			got := inform(t, s)
			expect(t, got, seen{"add", "stays", "10.0.0.1"})
			s.PutPod(NewRunningPod("node1", "default", "goes", nil, "10.0.0.2"))
			expect(t, got, seen{"add", "goes", "10.0.0.2"})

			s.Down()
			if _, err := http.Get(s.URL() + "/version"); err == nil {
				t.Error("a server that is down answered")
			}
			if err := s.DeletePod("default", "goes"); err != nil {
				t.Fatal(err)
			}
			// With the history gone the informer cannot go on where it was.
			s.Compact()
			if err := s.Up(); err != nil {
				t.Fatal(err)
			}
			// It replaces what it has by what there is: an update for what stayed, in either order.
			for stayed, gone := false, false; !stayed || !gone; {
				select {
				case e := <-got:
					gone = gone || e == seen{"delete", "goes", "10.0.0.2"}
					stayed = stayed || e == seen{"update", "stays", "10.0.0.1"}
				case <-time.After(20 * time.Second):
					t.Fatal("the informer did not catch up")
				}
			}
		})
	}
}

// TestReplacedPod: an informer whose watch was down sees that a pod was deleted and created
// again under its name.
func TestReplacedPod(t *testing.T) {
	s := start(t, Options{})
	s.PutPod(NewRunningPod("node1", "default", "db-0", nil, "10.0.0.1"))
	got := inform(t, s)
	expect(t, got, seen{"add", "db-0", "10.0.0.1"})
	s.PutPod(NewPod("node1", "default", "db-0", nil))
	expect(t, got, seen{"delete", "db-0", "10.0.0.1"}, seen{"add", "db-0", ""})
}

func TestGetAndList(t *testing.T) {
	s := start(t, Options{})
	s.PutNamespace("team", map[string]string{"iam.amazonaws.com/allowed-roles": `["app"]`})
	made := s.PutPod(NewRunningPod("node1", "team", "a", map[string]string{"iam.amazonaws.com/role": "app"}, "10.0.0.1"))
	s.PutPod(NewRunningPod("node1", "default", "b", nil, "10.0.0.2"))
	c := client(t, &rest.Config{Host: s.URL()})

	pod, err := c.CoreV1().Pods("team").Get(t.Context(), "a", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	made.TypeMeta = pod.TypeMeta // client-go drops it
	if diff := cmp.Diff(made, pod); diff != "" {
		t.Errorf("pod (-put +got):\n%s", diff)
	}
	if _, err := c.CoreV1().Pods("default").Get(t.Context(), "a", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("pod of another namespace: %v, want a not found", err)
	}
	ns, err := c.CoreV1().Namespaces().Get(t.Context(), "team", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if ns.Annotations["iam.amazonaws.com/allowed-roles"] != `["app"]` {
		t.Errorf("namespace annotations %v", ns.Annotations)
	}
	for _, test := range []struct {
		namespace, selector string
		want                []string
	}{
		{"", "", []string{"b", "a"}},
		{"team", "", []string{"a"}},
		{"", "status.podIP=10.0.0.2", []string{"b"}},
		{"", "metadata.name=a,spec.nodeName=node1", []string{"a"}},
		{"", "spec.nodeName!=node1", nil},
	} {
		list, err := c.CoreV1().Pods(test.namespace).List(t.Context(), metav1.ListOptions{FieldSelector: test.selector})
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, p := range list.Items {
			names = append(names, p.Name)
		}
		if diff := cmp.Diff(test.want, names); diff != "" {
			t.Errorf("list of %q by %q (-want +got):\n%s", test.namespace, test.selector, diff)
		}
	}
	if diff := cmp.Diff(5, s.Requests()[Request{"list", pods}]); diff != "" {
		t.Errorf("lists counted (-want +got):\n%s", diff)
	}
}

// TestRefusals checks the status and the reason of each refusal, as client-go's own tests tell
// them.
func TestRefusals(t *testing.T) {
	s := start(t, Options{})
	s.PutPod(NewPod("node1", "default", "a", nil))
	c := client(t, &rest.Config{Host: s.URL()})
	list := func(o metav1.ListOptions) error {
		_, err := c.CoreV1().Pods("").List(t.Context(), o)
		return err
	}
	exact := metav1.ListOptions{ResourceVersion: "1", ResourceVersionMatch: metav1.ResourceVersionMatchExact}
	if err := list(exact); !apierrors.IsResourceExpired(err) {
		t.Errorf("an exact version of the past: %v, want expired", err)
	}
	// Without MaxRetries the client would heed Retry-After, ten times.
	future := c.CoreV1().RESTClient().Get().Resource("pods").Param("resourceVersion", "99999").MaxRetries(0)
	if err := future.Do(t.Context()).Error(); !apierrors.IsTimeout(err) ||
		!apierrors.HasStatusCause(err, metav1.CauseTypeResourceVersionTooLarge) {
		t.Errorf("a version of the future: %v, want too large", err)
	}
	if err := list(metav1.ListOptions{FieldSelector: "spec.hostname=a"}); !apierrors.IsBadRequest(err) {
		t.Errorf("an unknown field: %v, want a bad request", err)
	}
	w, err := c.CoreV1().Pods("").Watch(t.Context(), metav1.ListOptions{ResourceVersionMatch: metav1.ResourceVersionMatchNotOlderThan})
	if !apierrors.IsInvalid(err) {
		t.Errorf("a watch with resourceVersionMatch alone: %v, %v, want invalid", w, err)
	}

	s.Compact()
	w, err = c.CoreV1().Pods("").Watch(t.Context(), metav1.ListOptions{ResourceVersion: "1"})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Stop()
	if e := <-w.ResultChan(); e.Type != watch.Error || !apierrors.IsResourceExpired(apierrors.FromObject(e.Object)) {
		t.Errorf("a watch from a forgotten version: %s %v, want expired", e.Type, e.Object)
	}

	s.SetFault(Fault{Status: http.StatusInternalServerError})
	if err := list(metav1.ListOptions{}); !apierrors.IsInternalError(err) {
		t.Errorf("with the fault set: %v, want an internal error", err)
	}
	s.SetFault(Fault{Latency: time.Hour})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := c.CoreV1().Pods("").List(ctx, metav1.ListOptions{}); ctx.Err() == nil {
		t.Errorf("with an hour's latency: an answer at once: %v", err)
	}
	s.SetFault(Fault{})
	if err := list(metav1.ListOptions{}); err != nil {
		t.Errorf("with the fault gone: %v", err)
	}

	protobuf := client(t, &rest.Config{Host: s.URL(), ContentConfig: rest.ContentConfig{AcceptContentTypes: "application/vnd.kubernetes.protobuf"}})
	if _, err := protobuf.CoreV1().Pods("").List(t.Context(), metav1.ListOptions{}); !apierrors.IsNotAcceptable(err) {
		t.Errorf("protobuf: %v, want not acceptable", err)
	}
}

// TestWatchFrame looks at the stream itself: a line an event, and a deletion under the version of
// the deletion.
func TestWatchFrame(t *testing.T) {
	s := start(t, Options{})
	made := s.PutPod(NewPod("node1", "default", "a", nil))
	resp, err := http.Get(s.URL() + "/api/v1/pods?watch=1&allowWatchBookmarks=true&timeoutSeconds=30&resourceVersion=" + made.ResourceVersion)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	next := func() (string, metav1.PartialObjectMetadata) {
		t.Helper()
		if !lines.Scan() {
			t.Fatalf("the stream ended: %v", lines.Err())
		}
		var e struct {
			Type   string
			Object metav1.PartialObjectMetadata
		}
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			t.Fatal(err)
		}
		return e.Type, e.Object
	}
	if err := s.SetStatus("default", "a", corev1.PodRunning, "10.0.0.1"); err != nil {
		t.Fatal(err)
	}
	typ, modified := next()
	if typ != "MODIFIED" || modified.Kind != "Pod" || modified.ResourceVersion <= made.ResourceVersion {
		t.Errorf("got %s %s at %s", typ, modified.Kind, modified.ResourceVersion)
	}
	if err := s.DeletePod("default", "a"); err != nil {
		t.Fatal(err)
	}
	typ, deleted := next()
	if typ != "DELETED" || deleted.ResourceVersion <= modified.ResourceVersion {
		t.Errorf("got %s at %s after %s", typ, deleted.ResourceVersion, modified.ResourceVersion)
	}
	s.SendBookmarks()
	if typ, mark := next(); typ != "BOOKMARK" || mark.ResourceVersion != deleted.ResourceVersion || mark.Name != "" {
		t.Errorf("got %s %q at %s", typ, mark.Name, mark.ResourceVersion)
	}
}

func TestTLSAndToken(t *testing.T) {
	s := start(t, Options{TLS: true, Token: "secret"})
	ca := filepath.Join(t.TempDir(), "ca.crt")
	if err := os.WriteFile(ca, s.CA(), 0o600); err != nil {
		t.Fatal(err)
	}
	config := &rest.Config{Host: s.URL(), BearerToken: "secret", TLSClientConfig: rest.TLSClientConfig{CAFile: ca}}
	list := func(c *rest.Config) error {
		_, err := client(t, c).CoreV1().Namespaces().List(t.Context(), metav1.ListOptions{FieldSelector: "metadata.name=default"})
		return err
	}
	if err := list(config); err != nil {
		t.Error(err)
	}
	wrong := rest.CopyConfig(config)
	wrong.BearerToken = "other"
	if err := list(wrong); !apierrors.IsUnauthorized(err) {
		t.Errorf("another token: %v, want unauthorized", err)
	}
	if err := list(&rest.Config{Host: s.URL(), BearerToken: "secret"}); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("without its authority: %v, want a certificate error", err)
	}
}

func TestEvents(t *testing.T) {
	s := start(t, Options{})
	c := client(t, &rest.Config{Host: s.URL()})
	e := &corev1.Event{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "a.1"}, Reason: "RoleRefused", Count: 1}
	if _, err := c.CoreV1().Events("default").CreateWithEventNamespaceWithContext(t.Context(), e); err != nil {
		t.Fatal(err)
	}
	if _, err := c.CoreV1().Events("default").PatchWithEventNamespaceWithContext(t.Context(), e, []byte(`{"count":2}`)); err != nil {
		t.Fatal(err)
	}
	got := s.Events()
	if len(got) != 1 || got[0].Reason != "RoleRefused" || got[0].Count != 2 {
		t.Errorf("events %+v, want the one that was made, counted twice", got)
	}
}
