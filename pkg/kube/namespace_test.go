package kube

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/google/go-cmp/cmp"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/rest"
)

// report is a call of FollowNamespace's callback.
type report struct {
	Annotations map[string]string
	Exists      bool
}

// follow follows the namespace "team" until the watch ends. The API server answers the list and the
// watch with these bodies; an empty one stands for status 503.
func follow(t *testing.T, list, watch string) (reports []report, err error) {
	t.Helper()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		query := r.URL.Query()
		if got := query.Get("fieldSelector"); got != "metadata.name=team" {
			t.Errorf("field selector %q", got)
		}
		body := list
		if query.Get("watch") != "" {
			if query.Get("resourceVersion") != "7" || query.Get("timeoutSeconds") == "" {
				t.Errorf("watch with %q", r.URL.RawQuery)
			}
			body = watch
		}
		if body == "" {
			http.Error(w, "unavailable", http.StatusServiceUnavailable)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprint(w, body)
	}))
	defer server.Close()
	client, err := New(&rest.Config{Host: server.URL, QPS: -1})
	if err != nil {
		t.Fatal(err)
	}
	defer client.CloseIdleConnections()
	err = client.FollowNamespace(t.Context(), "team", func(annotations map[string]string, exists bool) {
		reports = append(reports, report{annotations, exists})
	})
	return reports, err
}

// namespaceEvent is a watch event of the namespace.
func namespaceEvent(kind, value string) string {
	return fmt.Sprintf(`{"type":%q,"object":{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"team","annotations":{"a":%q}}}}`+"\n", kind, value)
}

func TestFollowNamespace(t *testing.T) {
	got, err := follow(t, `{"apiVersion":"v1","kind":"NamespaceList","metadata":{"resourceVersion":"7"},"items":[]}`,
		namespaceEvent("ADDED", "1")+namespaceEvent("BOOKMARK", "1")+namespaceEvent("MODIFIED", "2")+namespaceEvent("DELETED", "2"))
	if err != nil {
		t.Error(err)
	}
	want := []report{{nil, false}, {map[string]string{"a": "1"}, true}, {map[string]string{"a": "2"}, true}, {nil, false}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestFollowNamespaceErrors(t *testing.T) {
	const list = `{"apiVersion":"v1","kind":"NamespaceList","metadata":{"resourceVersion":"7"},"items":[{"metadata":{"name":"team","annotations":{"a":"1"}}}]}`
	listed := []report{{map[string]string{"a": "1"}, true}}
	for name, tt := range map[string]struct {
		list, watch string
		want        []report
		isError     func(error) bool
	}{
		"list is refused":              {"", "", nil, apierrors.IsServiceUnavailable},
		"list is not JSON":             {"<html>", "", nil, func(err error) bool { return err != nil }},
		"watch is refused":             {list, "", listed, apierrors.IsServiceUnavailable},
		"resource version has expired": {list, `{"type":"ERROR","object":{"apiVersion":"v1","kind":"Status","status":"Failure","reason":"Expired","code":410}}`, listed, apierrors.IsResourceExpired},
		"event is not a namespace":     {list, `{"type":"MODIFIED","object":[]}`, listed, func(err error) bool { return err != nil }},
		"event of another type":        {list, `{"type":"MODIFIED","object":{"apiVersion":"v1","kind":"Pod","metadata":{"name":"team"}}}`, listed, func(err error) bool { return err != nil }},
		// client-go logs this one and ends the watch. The caller follows the namespace again.
		"connection ends within an event": {list, `{"type":"MODIFIED","object":{"metadata":{"anno`, listed, func(err error) bool { return err == nil }},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := follow(t, tt.list, tt.watch)
			if !tt.isError(err) {
				t.Errorf("error %v", err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}
