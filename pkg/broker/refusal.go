package broker

import (
	"cmp"
	"errors"
	"fmt"
	"net/http"
	"net/netip"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/credentials"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/imds"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/pods"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
)

var (
	errOtherRole     = errors.New("the pod asked for a role that is not its own")
	errHostNetwork   = errors.New("the pod is on the host's network and has the node's own role, not the one that its annotation names")
	errAddressReused = errors.New("the address went to another pod while the request was answered")
)

// The reasons of Events, in the order of the checks.
const (
	RoleIgnored     = "IAMRoleIgnored"            // the pod is on the host's network
	RoleInvalid     = "IAMRoleInvalid"            // an annotation is invalid
	RoleForbidden   = "IAMRoleForbidden"          // the namespace does not allow the role
	RoleDenied      = "IAMRoleDenied"             // STS refuses the role
	RoleThrottled   = "IAMRoleThrottled"          // STS throttles the node's calls
	STSUnavailable  = "IAMSTSUnavailable"         // STS cannot be reached or does not answer
	NodeCredentials = "IAMNodeCredentialsMissing" // the node has no credentials, or STS does not accept them
	NodeClockSkew   = "IAMNodeClockSkew"          // the node's clock is wrong
)

// refuseAddress returns the refusal for an error of Pods.Resolve.
func refuseAddress(ip netip.Addr, err error) *imds.Refusal {
	status := http.StatusInternalServerError
	for _, permanent := range []error{pods.ErrUnknown, pods.ErrNotAPod, pods.ErrAmbiguous, pods.ErrFinished} {
		if errors.Is(err, permanent) {
			status = http.StatusNotFound
		}
	}
	return &imds.Refusal{Status: status, Pod: ip.String(), Err: err}
}

// classify returns the status of the answer to a pod without a role, and the reason of its Event,
// or "" for no Event.
func classify(err error) (status int, reason string) {
	_, invalid := errors.AsType[*roles.InvalidError](err)
	switch {
	case errors.Is(err, roles.ErrNoRole):
		return http.StatusNotFound, ""
	case invalid:
		return http.StatusNotFound, RoleInvalid
	case errors.Is(err, roles.ErrForbidden):
		return http.StatusForbidden, RoleForbidden
	case errors.Is(err, errHostNetwork):
		return http.StatusInternalServerError, RoleIgnored
	}
	return http.StatusInternalServerError, ""
}

// refuseCredentials returns the refusal for an error of Credentials.Get.
func refuseCredentials(pod *pods.Pod, a roles.Assumption, err error) *imds.Refusal {
	r := &imds.Refusal{Status: http.StatusInternalServerError, Pod: pod.String(), Err: err}
	if e, ok := errors.AsType[*credentials.Error](err); ok && (e.Kind == credentials.Denied || e.Kind == credentials.Malformed) {
		r.Status, r.Code, r.Message = http.StatusForbidden, "AssumeRoleUnauthorizedAccess", denialMessage(a, e)
	}
	return r
}

// stsEvent returns the Event about a failed call to STS. The pod's owner reads the message, so it
// does not contain the error's Message, which may name the node's role.
func stsEvent(a roles.Assumption, err *credentials.Error) (reason, message string) {
	retries := fmt.Sprintf("The proxy keeps trying to get credentials of the role %s.", a.RoleARN)
	switch err.Kind {
	case credentials.Denied, credentials.Malformed:
		return RoleDenied, denialMessage(a, err)
	case credentials.Throttled:
		return RoleThrottled, fmt.Sprintf("STS is asked too often (%s). %s", err.Code, retries)
	case credentials.ClockSkew:
		return NodeClockSkew, fmt.Sprintf("STS does not accept this node's time: %s. %s", err.Cause, retries)
	case credentials.NodeCredentials:
		problem := "This node has no AWS credentials of its own that STS accepts"
		if err.Cause != "" {
			problem = "This node cannot ask STS for the pod's role: " + err.Cause
		}
		return NodeCredentials, fmt.Sprintf("%s (%s); the proxy's log has the details. %s", problem, err.Code, retries)
	}
	return STSUnavailable, fmt.Sprintf("STS cannot be reached from this node, or does not answer (%s); the proxy's log has the details. %s", err.Code, retries)
}

// denialMessage returns a message for the pod's owner, without the error's Message.
func denialMessage(a roles.Assumption, err *credentials.Error) string {
	return fmt.Sprintf("STS refused to let the node assume the role %s: %s: %s.", a.RoleARN, err.Code,
		cmp.Or(err.Cause, "check the role's trust policy and the pod's annotations"))
}
