package kubeapi

import (
	"encoding/json"
	"net/http"
	"strconv"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"k8s.io/apimachinery/pkg/watch"
)

// watchRequest has the parameters of a watch (API concepts, "Semantics for watch" and "Streaming
// lists").
type watchRequest struct {
	resource string
	selector selector
	from     uint64
	// initial sends the current state first, as added objects. announce sends a bookmark after it.
	initial, announce bool
	bookmarks         bool
	timeout           time.Duration // zero for none
}

func watchOf(r *http.Request, resource string, sel selector) (watchRequest, *apierrors.StatusError) {
	q := r.URL.Query()
	req := watchRequest{resource: resource, selector: sel, bookmarks: q.Get("allowWatchBookmarks") == "true"}
	var err *apierrors.StatusError
	if req.from, err = parseVersion(q.Get("resourceVersion")); err != nil {
		return req, err
	}
	if seconds, err := strconv.Atoi(q.Get("timeoutSeconds")); err == nil && seconds > 0 {
		req.timeout = time.Duration(seconds) * time.Second
	}
	match := metav1.ResourceVersionMatch(q.Get("resourceVersionMatch"))
	switch q.Get("sendInitialEvents") {
	case "":
		if match != "" {
			return req, invalid("resourceVersionMatch", "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided")
		}
		req.initial = req.from == 0
		return req, nil
	case "true":
		req.initial, req.announce = true, req.bookmarks
	}
	if match != metav1.ResourceVersionMatchNotOlderThan {
		return req, invalid("resourceVersionMatch", "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan")
	}
	return req, nil
}

func invalid(name, reason string) *apierrors.StatusError {
	return apierrors.NewInvalid(schema.GroupKind{Group: metav1.GroupName, Kind: "ListOptions"}, "",
		field.ErrorList{field.Forbidden(field.NewPath(name), reason)})
}

// watch streams the changes, one JSON object a line, until the client disconnects, the timeout
// passes or the watch is dropped.
func (s *Server) watch(w http.ResponseWriter, r *http.Request, resource string, sel selector) *apierrors.StatusError {
	req, err := watchOf(r, resource, sel)
	if err != nil {
		return err
	}
	objects, at := s.store.list(resource)
	if req.from > at {
		return tooNew(req.from, at)
	}
	var timeout <-chan time.Time
	if req.timeout > 0 {
		timer := time.NewTimer(req.timeout)
		defer timer.Stop()
		timeout = timer.C
	}
	drop := s.dropWatches.next()
	out := stream{w: w, resource: resource}
	w.Header().Set("Content-Type", runtime.ContentTypeJSON)
	out.flush()
	if req.initial {
		for _, obj := range objects {
			if sel.match(obj) {
				out.send(watch.Added, obj)
			}
		}
		if req.announce {
			out.bookmark(at, map[string]string{metav1.InitialEventsAnnotationKey: "true"})
		}
		req.from = at
	}
	for {
		// Both are taken before the changes are read, so that none is missed.
		changed, bookmark := s.store.changed.next(), s.bookmark.next()
		changes, at, err := s.store.since(resource, req.from)
		if err != nil {
			// The watch has begun with 200, so the error is an event, as from the API server's
			// watch cache.
			out.send(watch.Error, statusOf(err))
			return nil
		}
		req.from = at
		for _, e := range changes {
			out.change(e, sel)
		}
		out.flush()
		select {
		case <-changed:
		case <-bookmark:
			if req.bookmarks {
				out.bookmark(at, nil)
			}
		case <-drop:
			panic(http.ErrAbortHandler)
		case <-timeout:
			return nil
		case <-r.Context().Done():
			return nil
		}
	}
}

func statusOf(err *apierrors.StatusError) *metav1.Status {
	status := err.ErrStatus
	status.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}
	return &status
}

// stream writes watch events. It ignores errors: the request's context ends with the connection.
type stream struct {
	w        http.ResponseWriter
	resource string
}

func (s stream) flush() { http.NewResponseController(s.w).Flush() }

func (s stream) send(t watch.EventType, obj runtime.Object) {
	json.NewEncoder(s.w).Encode(struct {
		Type   watch.EventType `json:"type"`
		Object runtime.Object  `json:"object"`
	}{t, obj})
}

// change sends a change as the selector sees it: an object that begins or ceases to match is added
// or deleted.
func (s stream) change(e event, sel selector) {
	before, after := sel.match(e.before), sel.match(e.after)
	switch {
	case before && after:
		s.send(watch.Modified, e.after)
	case after:
		s.send(watch.Added, e.after)
	case before:
		s.send(watch.Deleted, gone(e))
	}
}

// gone returns the last state of a deleted object with the version of the deletion, as the API
// server sends it.
func gone(e event) object {
	last := e.before.DeepCopyObject().(object)
	last.SetResourceVersion(strconv.FormatUint(e.version, 10))
	return last
}

// bookmark sends an object of the watched kind with a version only.
func (s stream) bookmark(at uint64, annotations map[string]string) {
	obj := newObject(s.resource)
	kind := "Pod"
	if s.resource == namespaces {
		kind = "Namespace"
	}
	obj.GetObjectKind().SetGroupVersionKind(schema.GroupVersionKind{Version: "v1", Kind: kind})
	obj.SetResourceVersion(strconv.FormatUint(at, 10))
	obj.SetAnnotations(annotations)
	s.send(watch.Bookmark, obj)
}
