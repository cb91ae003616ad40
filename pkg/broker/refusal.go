package broker

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/credentials"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/pods"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
)

// Refusal is why a pod gets no credentials, and how the metadata service answers.
type Refusal struct {
	// Status is the HTTP status of the answer.
	Status int
	// Code and Message are the fields of the answer's document. If Code is empty, it has no document.
	Code, Message string
	// Pod is "<namespace>/<name>", or the address of an unknown pod.
	Pod string
	// Err is the full reason. It is for the log, not for the pod.
	Err error
}

// Error implements error.
func (r *Refusal) Error() string { return fmt.Sprintf("%s: %v", r.Pod, r.Err) }

func (r *Refusal) Unwrap() error { return r.Err }

// HTTPStatus returns Status.
func (r *Refusal) HTTPStatus() int { return r.Status }

// Document returns Code and Message.
func (r *Refusal) Document() (code, message string) { return r.Code, r.Message }

// Subject returns Pod.
func (r *Refusal) Subject() string { return r.Pod }

var (
	errOtherRole     = errors.New("the pod asked for a role that is not its own")
	errHostNetwork   = errors.New("the pod is on the host's network and has the node's own role, not the one that its annotation names")
	errAddressReused = errors.New("the address went to another pod while the request was answered")
)

func refuseAddress(ip netip.Addr, err error) *Refusal {
	status := http.StatusInternalServerError
	for _, permanent := range []error{pods.ErrUnknown, pods.ErrNotAPod, pods.ErrAmbiguous, pods.ErrFinished} {
		if errors.Is(err, permanent) {
			status = http.StatusNotFound
		}
	}
	return &Refusal{Status: status, Pod: ip.String(), Err: err}
}

func refuseRole(pod *pods.Pod, err error) *Refusal {
	status := http.StatusInternalServerError
	_, invalid := errors.AsType[*roles.InvalidError](err)
	switch {
	case errors.Is(err, roles.ErrNoRole), invalid:
		status = http.StatusNotFound
	case errors.Is(err, roles.ErrForbidden):
		status = http.StatusForbidden
	}
	return &Refusal{Status: status, Pod: pod.String(), Err: err}
}

// refuseCredentials returns the refusal for an error of Credentials.Get.
func refuseCredentials(pod *pods.Pod, a roles.Assumption, err error) *Refusal {
	r := &Refusal{Status: http.StatusInternalServerError, Pod: pod.String(), Err: err}
	if e, ok := errors.AsType[*credentials.Error](err); ok && (e.Kind == credentials.Denied || e.Kind == credentials.Malformed) {
		r.Status, r.Code, r.Message = http.StatusForbidden, "AssumeRoleUnauthorizedAccess", denialMessage(a, e)
	}
	return r
}
