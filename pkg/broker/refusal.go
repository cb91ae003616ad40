package broker

import (
	"errors"
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

// refuseRole returns the refusal for a pod without a role.
func refuseRole(pod *pods.Pod, err error) *imds.Refusal {
	status := http.StatusInternalServerError
	_, invalid := errors.AsType[*roles.InvalidError](err)
	switch {
	case errors.Is(err, roles.ErrNoRole), invalid:
		status = http.StatusNotFound
	case errors.Is(err, roles.ErrForbidden):
		status = http.StatusForbidden
	}
	return &imds.Refusal{Status: status, Pod: pod.String(), Err: err}
}

// refuseCredentials returns the refusal for an error of Credentials.Get.
func refuseCredentials(pod *pods.Pod, a roles.Assumption, err error) *imds.Refusal {
	r := &imds.Refusal{Status: http.StatusInternalServerError, Pod: pod.String(), Err: err}
	if e, ok := errors.AsType[*credentials.Error](err); ok && (e.Kind == credentials.Denied || e.Kind == credentials.Malformed) {
		r.Status, r.Code, r.Message = http.StatusForbidden, "AssumeRoleUnauthorizedAccess", denialMessage(a, e)
	}
	return r
}
