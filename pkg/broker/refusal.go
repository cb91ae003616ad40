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

// Refusal is why a pod gets no credentials, and the metadata service's answer.
type Refusal struct {
	// Status is the HTTP status of the answer.
	Status int
	// Code and Message are for the pod: the fields of the document in the answer's body. Without a Code there is no document.
	Code, Message string
	// Pod is "<namespace>/<name>", or the address if no pod was found.
	Pod string
	// Err is the whole reason, for the log.
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
	errOtherRole = errors.New("the pod asked for a role that is not its own")
	// errHostNetwork is the reason for a pod whose requests cannot be told from the node's own.
	errHostNetwork = errors.New("the pod is on the host's network and has the node's own role, not the one that its annotation names")
	errHandedOver  = errors.New("the address went to another holder while the request was answered")
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

// The reasons of Events, in the order of the checks.
const (
	RoleIgnored     = "IAMRoleIgnored"            // the pod is on the host's network, where its annotation has no effect
	RoleInvalid     = "IAMRoleInvalid"            // an annotation holds no usable value
	RoleForbidden   = "IAMRoleForbidden"          // the namespace does not allow the role
	RoleDenied      = "IAMRoleDenied"             // STS refuses it
	RoleThrottled   = "IAMRoleThrottled"          // STS throttles the node's calls
	STSUnavailable  = "IAMSTSUnavailable"         // STS cannot be reached, or does not answer
	NodeCredentials = "IAMNodeCredentialsMissing" // the node has none, or STS does not accept them
	NodeClockSkew   = "IAMNodeClockSkew"          // the node's clock is wrong
)

// eventReason returns the reason of the Event about a pod without a role; empty if there is nothing to correct.
func eventReason(err error) string {
	_, invalid := errors.AsType[*roles.InvalidError](err)
	switch {
	case errors.Is(err, errHostNetwork):
		return RoleIgnored
	case invalid:
		return RoleInvalid
	case errors.Is(err, roles.ErrForbidden):
		return RoleForbidden
	}
	return ""
}

// failure returns the Event about a failed call to STS. The message is for the pod's owner, so it has nothing of the error's
// Message, which may name the node's role.
func failure(a roles.Assumption, err *credentials.Error) (reason, message string) {
	again := fmt.Sprintf("The proxy keeps trying to get credentials of the role %s.", a.RoleARN)
	switch err.Kind {
	case credentials.Denied, credentials.Malformed:
		return RoleDenied, refusedRole(a, err)
	case credentials.Throttled:
		return RoleThrottled, fmt.Sprintf("STS is asked too often (%s). %s", err.Code, again)
	case credentials.NodeCredentials:
		if err.Cause != "" {
			return NodeCredentials, fmt.Sprintf("This node cannot ask STS for the pod's role: %s (%s); the proxy's log has the details. %s", err.Cause, err.Code, again)
		}
		return NodeCredentials, fmt.Sprintf("This node has no AWS credentials of its own that STS accepts (%s); the proxy's log has the details. %s", err.Code, again)
	case credentials.ClockSkew:
		return NodeClockSkew, fmt.Sprintf("STS does not accept this node's time: %s. %s", err.Cause, again)
	}
	return STSUnavailable, fmt.Sprintf("STS cannot be reached from this node, or does not answer (%s); the proxy's log has the details. %s", err.Code, again)
}

// refusedRole returns a message for the pod's owner, without STS's own text, which names the node's role.
func refusedRole(a roles.Assumption, err *credentials.Error) string {
	cause := err.Cause
	if cause == "" {
		cause = "check the role's trust policy and the pod's annotations"
	}
	return fmt.Sprintf("STS refused to let the node assume the role %s: %s: %s.", a.RoleARN, err.Code, cause)
}

// refuseCredentials returns the refusal of a failed Get. The pod does not see STS's own text, which names the node's role.
func refuseCredentials(pod *pods.Pod, a roles.Assumption, err error) *Refusal {
	if e, ok := errors.AsType[*credentials.Error](err); ok && (e.Kind == credentials.Denied || e.Kind == credentials.Malformed) {
		return &Refusal{
			Status:  http.StatusForbidden,
			Code:    "AssumeRoleUnauthorizedAccess",
			Message: refusedRole(a, e),
			Pod:     pod.String(), Err: err,
		}
	}
	return &Refusal{Status: http.StatusInternalServerError, Pod: pod.String(), Err: err}
}
