package kubeapi

import (
	"encoding/json"
	"fmt"
	"io"
	"mime"
	"net/http"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/strategicpatch"
)

// maxBody is larger than any Event.
const maxBody = 64 << 10

// createEvent creates an Event of the core group or of events.k8s.io. It ignores the fields that
// only the latter has.
func (s *Server) createEvent(w http.ResponseWriter, r *http.Request) *apierrors.StatusError {
	body, statusErr := readBody(r, runtime.ContentTypeJSON)
	if statusErr != nil {
		return statusErr
	}
	var e corev1.Event
	if err := json.Unmarshal(body, &e); err != nil {
		return apierrors.NewBadRequest(err.Error())
	}
	namespace := r.PathValue("namespace")
	if e.Namespace != namespace {
		return apierrors.NewBadRequest(fmt.Sprintf(
			"the namespace of the provided object does not match the namespace sent on the request: %q, %q", e.Namespace, namespace))
	}
	e.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "Event"}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.eventLocked(namespace, e.Name) != nil {
		return apierrors.NewAlreadyExists(schema.GroupResource{Resource: events}, e.Name)
	}
	s.events = append(s.events, e)
	return writeJSON(w, http.StatusCreated, e)
}

// patchEvent updates an Event, as a recorder does for a repetition.
func (s *Server) patchEvent(w http.ResponseWriter, r *http.Request) *apierrors.StatusError {
	patch, statusErr := readBody(r, "application/strategic-merge-patch+json")
	if statusErr != nil {
		return statusErr
	}
	name := r.PathValue("name")
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.eventLocked(r.PathValue("namespace"), name)
	if e == nil {
		return apierrors.NewNotFound(schema.GroupResource{Resource: events}, name)
	}
	before, err := json.Marshal(e)
	if err != nil {
		return apierrors.NewInternalError(err)
	}
	after, err := strategicpatch.StrategicMergePatch(before, patch, e)
	if err != nil {
		return apierrors.NewBadRequest(err.Error())
	}
	var patched corev1.Event
	if err := json.Unmarshal(after, &patched); err != nil {
		return apierrors.NewBadRequest(err.Error())
	}
	*e = patched
	return writeJSON(w, http.StatusOK, patched)
}

func (s *Server) eventLocked(namespace, name string) *corev1.Event {
	for i := range s.events {
		if s.events[i].Namespace == namespace && s.events[i].Name == name {
			return &s.events[i]
		}
	}
	return nil
}

func readBody(r *http.Request, contentType string) ([]byte, *apierrors.StatusError) {
	if media, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || media != contentType {
		return nil, apierrors.NewGenericServerResponse(http.StatusUnsupportedMediaType, r.Method, schema.GroupResource{}, "",
			fmt.Sprintf("the body must be %s, not %q", contentType, r.Header.Get("Content-Type")), 0, true)
	}
	body, err := io.ReadAll(http.MaxBytesReader(nil, r.Body, maxBody))
	if err != nil {
		return nil, apierrors.NewBadRequest(err.Error())
	}
	return body, nil
}
