package kube

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/google/go-cmp/cmp"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/rest"
)

// told is one call of FollowNamespace's tell.
type told struct {
	Annotations map[string]string
	Exists      bool
}

// follow follows the namespace "team" of an API server whose list and watch have these bodies, until the watch ends.
func follow(t *testing.T, list, watch string) (all []told, err error) {
	t.Helper()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if got := r.URL.Query().Get("fieldSelector"); got != "metadata.name=team" {
			t.Errorf("asked for %q", got)
		}
		body := list
		if r.URL.Query().Get("watch") != "" {
			if r.URL.Query().Get("resourceVersion") != "7" || r.URL.Query().Get("timeoutSeconds") == "" {
				t.Errorf("watch of %q", r.URL.RawQuery)
			}
			body = watch
		}
		if body == "" {
			http.Error(w, "away", http.StatusServiceUnavailable)
			return
		}
		fmt.Fprint(w, body)
	}))
	defer server.Close()
	client, err := New(&rest.Config{Host: server.URL, QPS: -1})
	if err != nil {
		t.Fatal(err)
	}
	defer client.CloseIdleConnections()
	err = client.FollowNamespace(context.Background(), "team", func(annotations map[string]string, exists bool) {
		all = append(all, told{annotations, exists})
	})
	return all, err
}

func TestNamespaceIsFollowedThroughItsLife(t *testing.T) {
	got, err := follow(t, `{"kind":"NamespaceList","metadata":{"resourceVersion":"7"},"items":[]}`,
		`{"type":"ADDED","object":{"kind":"Namespace","metadata":{"name":"team","annotations":{"a":"1"}}}}
{"type":"BOOKMARK","object":{"kind":"Namespace","metadata":{"resourceVersion":"8"}}}
{"type":"MODIFIED","object":{"kind":"Namespace","metadata":{"name":"team","annotations":{"a":"2"}}}}
{"type":"DELETED","object":{"kind":"Namespace","metadata":{"name":"team","annotations":{"a":"2"}}}}
`)
	if err != nil {
		t.Errorf("a watch that ended in order: %v", err)
	}
	want := []told{{nil, false}, {map[string]string{"a": "1"}, true}, {map[string]string{"a": "2"}, true}, {nil, false}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestFollowingANamespaceFailsWithTheAPIsError(t *testing.T) {
	const list = `{"metadata":{"resourceVersion":"7"},"items":[{"metadata":{"name":"team","annotations":{"a":"1"}}}]}`
	now := []told{{map[string]string{"a": "1"}, true}}
	for name, c := range map[string]struct {
		list, watch string
		want        []told
		is          func(error) bool
	}{
		"the list is refused":      {"", "", nil, apierrors.IsServiceUnavailable},
		"the list is no JSON":      {"<html>", "", nil, nil},
		"the watch is refused":     {list, "", now, apierrors.IsServiceUnavailable},
		"the watch is too old":     {list, `{"type":"ERROR","object":{"kind":"Status","status":"Failure","reason":"Expired","code":410}}`, now, apierrors.IsResourceExpired},
		"the watch breaks off":     {list, `{"type":"MODIFIED","object":{"metadata":{"anno`, now, nil},
		"an event is no namespace": {list, `{"type":"MODIFIED","object":[]}`, now, nil},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := follow(t, c.list, c.watch)
			if err == nil || c.is != nil && !c.is(err) {
				t.Errorf("error %v", err)
			}
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}
