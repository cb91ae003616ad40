package kubeapi

import (
	"crypto/subtle"
	"encoding/json"
	"fmt"
	"mime"
	"net/http"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/version"
)

// handler routes the requests. It sends an error of a handler as its Status.
func (s *Server) handler() http.Handler {
	mux := http.NewServeMux()
	handle := func(pattern, resource string, h func(w http.ResponseWriter, r *http.Request) *apierrors.StatusError) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			s.count(verb(r, resource), resource)
			err := s.admit(r)
			if err == nil {
				err = h(w, r)
			}
			if err != nil {
				writeStatus(w, err)
			}
		})
	}
	collection := func(resource string) func(http.ResponseWriter, *http.Request) *apierrors.StatusError {
		return func(w http.ResponseWriter, r *http.Request) *apierrors.StatusError {
			return s.listOrWatch(w, r, resource)
		}
	}
	single := func(resource string) func(http.ResponseWriter, *http.Request) *apierrors.StatusError {
		return func(w http.ResponseWriter, r *http.Request) *apierrors.StatusError { return s.get(w, r, resource) }
	}
	handle("GET /api/v1/pods", pods, collection(pods))
	handle("GET /api/v1/namespaces/{namespace}/pods", pods, collection(pods))
	handle("GET /api/v1/namespaces/{namespace}/pods/{name}", pods, single(pods))
	handle("GET /api/v1/namespaces", namespaces, collection(namespaces))
	handle("GET /api/v1/namespaces/{name}", namespaces, single(namespaces))
	for _, group := range []string{"/api/v1", "/apis/events.k8s.io/v1"} {
		handle("POST "+group+"/namespaces/{namespace}/events", events, s.createEvent)
		handle("PATCH "+group+"/namespaces/{namespace}/events/{name}", events, s.patchEvent)
	}
	handle("GET /version", "version", func(w http.ResponseWriter, _ *http.Request) *apierrors.StatusError {
		return writeJSON(w, http.StatusOK, version.Info{Major: "1", Minor: "37", GitVersion: "v1.37.2"})
	})
	handle("/", "unknown", func(_ http.ResponseWriter, r *http.Request) *apierrors.StatusError {
		return apierrors.NewGenericServerResponse(http.StatusNotFound, r.Method, schema.GroupResource{}, "", "", 0, true)
	})
	return mux
}

// verb returns the request's verb, as the API server's metrics name it.
func verb(r *http.Request, resource string) string {
	switch {
	case r.Method == http.MethodPost:
		return "create"
	case r.Method == http.MethodPatch:
		return "patch"
	case r.PathValue("name") != "" || resource != pods && resource != namespaces:
		return "get"
	case isWatch(r):
		return "watch"
	}
	return "list"
}

func isWatch(r *http.Request) bool {
	on, err := strconv.ParseBool(r.URL.Query().Get("watch"))
	return err == nil && on
}

// admit checks what is common to all requests: the fault, the token, and whether the client accepts
// JSON.
func (s *Server) admit(r *http.Request) *apierrors.StatusError {
	if status := s.spoil(r); status != 0 {
		return apierrors.NewGenericServerResponse(status, r.Method, schema.GroupResource{}, "", "injected fault", 0, true)
	}
	token, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if s.token != "" && subtle.ConstantTimeCompare([]byte(token), []byte(s.token)) != 1 {
		return apierrors.NewUnauthorized("Unauthorized")
	}
	if !acceptsJSON(r.Header.Get("Accept")) {
		return apierrors.NewGenericServerResponse(http.StatusNotAcceptable, r.Method, schema.GroupResource{}, "",
			"only application/json is served, not "+r.Header.Get("Accept"), 0, true)
	}
	return nil
}

func acceptsJSON(accept string) bool {
	if accept == "" {
		return true
	}
	for _, one := range strings.Split(accept, ",") {
		// An "as" asks for a table or for metadata only, which this server does not have.
		media, params, err := mime.ParseMediaType(one)
		if err == nil && params["as"] == "" && (media == "application/json" || media == "*/*" || media == "application/*") {
			return true
		}
	}
	return false
}

func (s *Server) get(w http.ResponseWriter, r *http.Request, resource string) *apierrors.StatusError {
	namespace, name := r.PathValue("namespace"), r.PathValue("name")
	obj, ok := s.store.get(resource, namespace, name)
	if !ok {
		return apierrors.NewNotFound(schema.GroupResource{Resource: resource}, name)
	}
	return writeJSON(w, http.StatusOK, obj)
}

func (s *Server) listOrWatch(w http.ResponseWriter, r *http.Request, resource string) *apierrors.StatusError {
	sel, err := selectorOf(resource, r.PathValue("namespace"), r.URL.Query())
	if err != nil {
		return err
	}
	if isWatch(r) {
		return s.watch(w, r, resource, sel)
	}
	return s.list(w, r, resource, sel)
}

// list answers with the current state, which is correct for no version, for "0" and for
// NotOlderThan. An exact version is served only while it is current (API concepts, "Semantics for
// get and list").
func (s *Server) list(w http.ResponseWriter, r *http.Request, resource string, sel selector) *apierrors.StatusError {
	q := r.URL.Query()
	asked, err := parseVersion(q.Get("resourceVersion"))
	if err != nil {
		return err
	}
	objects, at := s.store.list(resource)
	switch {
	case asked > at:
		return tooNew(asked, at)
	case q.Get("resourceVersionMatch") == string(metav1.ResourceVersionMatchExact) && asked < at:
		return tooOld(asked, at)
	}
	meta := metav1.ListMeta{ResourceVersion: strconv.FormatUint(at, 10)}
	if resource == namespaces {
		list := corev1.NamespaceList{ListMeta: meta, Items: []corev1.Namespace{}}
		list.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "NamespaceList"}
		for _, obj := range objects {
			if sel.match(obj) {
				list.Items = append(list.Items, *obj.(*corev1.Namespace))
			}
		}
		return writeJSON(w, http.StatusOK, list)
	}
	list := corev1.PodList{ListMeta: meta, Items: []corev1.Pod{}}
	list.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "PodList"}
	for _, obj := range objects {
		if sel.match(obj) {
			list.Items = append(list.Items, *obj.(*corev1.Pod))
		}
	}
	return writeJSON(w, http.StatusOK, list)
}

func parseVersion(s string) (uint64, *apierrors.StatusError) {
	if s == "" {
		return 0, nil
	}
	v, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		return 0, apierrors.NewBadRequest(fmt.Sprintf("resourceVersion: Invalid value: %q", s))
	}
	return v, nil
}

// tooOld is the API server's answer to a version whose history is removed: the client must list
// again.
func tooOld(asked, oldest uint64) *apierrors.StatusError {
	return apierrors.NewResourceExpired(fmt.Sprintf("too old resource version: %d (%d)", asked, oldest))
}

// tooNew is the API server's answer to a version that it has not reached. client-go recognises it
// by its cause.
func tooNew(asked, current uint64) *apierrors.StatusError {
	err := apierrors.NewTimeoutError(fmt.Sprintf("Too large resource version: %d, current: %d", asked, current), 1)
	err.ErrStatus.Details.Causes = []metav1.StatusCause{{
		Type:    metav1.CauseTypeResourceVersionTooLarge,
		Message: "Too large resource version",
	}}
	return err
}

func writeJSON(w http.ResponseWriter, status int, body any) *apierrors.StatusError {
	data, err := json.Marshal(body)
	if err != nil {
		return apierrors.NewInternalError(err)
	}
	w.Header().Set("Content-Type", runtime.ContentTypeJSON)
	w.WriteHeader(status)
	w.Write(data)
	return nil
}

func writeStatus(w http.ResponseWriter, err *apierrors.StatusError) {
	status := err.ErrStatus
	status.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}
	if status.Details != nil && status.Details.RetryAfterSeconds > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(int(status.Details.RetryAfterSeconds)))
	}
	writeJSON(w, int(status.Code), status)
}
