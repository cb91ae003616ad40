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

// Refusal is why a pod gets no credentials, and how the metadata service says it.
type Refusal struct {
	// Status is the HTTP status of the answer. 200 means that the answer is a document with Code and Message in place of
	// credentials, which is how the metadata service reports a role that cannot be assumed.
	Status int
	// Code and Message are for the pod's eyes.
	Code, Message string
	// Pod is "<namespace>/<name>", or the address where no pod was found.
	Pod string
	// Err is the whole reason, for the log.
	Err error
}

// Error implements error.
func (r *Refusal) Error() string { return fmt.Sprintf("%s: %v", r.Pod, r.Err) }

func (r *Refusal) Unwrap() error { return r.Err }

// HTTPStatus is Status.
func (r *Refusal) HTTPStatus() int { return r.Status }

// Document is Code and Message.
func (r *Refusal) Document() (code, message string) { return r.Code, r.Message }

// Subject is Pod.
func (r *Refusal) Subject() string { return r.Pod }

var (
	errOtherRole  = errors.New("the pod asked for a role that is not its own")
	errHandedOver = errors.New("the address went to another holder while the request was answered")
)

func refusePod(ip netip.Addr, err error) *Refusal {
	for _, known := range []error{pods.ErrUnknown, pods.ErrNotAPod, pods.ErrAmbiguous, pods.ErrFinished} {
		if errors.Is(err, known) {
			return &Refusal{Status: http.StatusNotFound, Pod: ip.String(), Err: err}
		}
	}
	return &Refusal{Status: http.StatusInternalServerError, Pod: ip.String(), Err: err}
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

// The reasons of Events, in the order of what a pod goes through.
const (
	RoleInvalid   = "IAMRoleInvalid"   // an annotation says nothing usable
	RoleForbidden = "IAMRoleForbidden" // the namespace does not allow the role
	RoleDenied    = "IAMRoleDenied"    // STS refuses it
	RoleThrottled = "IAMRoleThrottled" // STS has been asked too often
)

// eventReason is the reason of an Event about a role that was not decided; empty for what is nobody's mistake.
func eventReason(err error) string {
	if _, invalid := errors.AsType[*roles.InvalidError](err); invalid {
		return RoleInvalid
	}
	if errors.Is(err, roles.ErrForbidden) {
		return RoleForbidden
	}
	return ""
}

// failure is the Event about a call to STS that failed; an empty reason for what the pod's owner can do nothing about.
func failure(a roles.Assumption, err *credentials.Error) (reason, message string) {
	switch err.Kind {
	case credentials.Denied, credentials.Malformed:
		return RoleDenied, refusedRole(a, err)
	case credentials.Throttled:
		return RoleThrottled, fmt.Sprintf("STS is asked too often (%s): credentials of the role %s are tried for again.", err.Code, a.RoleARN)
	}
	return "", ""
}

// refusedRole is for the eyes of the pod's owner: STS's own words name the node's role.
func refusedRole(a roles.Assumption, err *credentials.Error) string {
	return fmt.Sprintf("STS refused to let the node assume the role %s: %s. Check the role's trust policy and the pod's annotations.", a.RoleARN, err.Code)
}

// refuseCredentials tells the pod that its role was refused, but not in the words of STS, which name the node's own role.
func refuseCredentials(pod *pods.Pod, a roles.Assumption, err error) *Refusal {
	if e, ok := errors.AsType[*credentials.Error](err); ok && (e.Kind == credentials.Denied || e.Kind == credentials.Malformed) {
		return &Refusal{
			Status:  http.StatusOK,
			Code:    "AssumeRoleUnauthorizedAccess",
			Message: refusedRole(a, e),
			Pod:     pod.String(), Err: err,
		}
	}
	return &Refusal{Status: http.StatusInternalServerError, Pod: pod.String(), Err: err}
}
