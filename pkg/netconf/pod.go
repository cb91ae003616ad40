package netconf

import (
	"github.com/containernetworking/cni/pkg/types"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
)

// podArgs are the arguments that Kubernetes' runtimes pass, under their names in CNI_ARGS.
type podArgs struct {
	types.CommonArgs
	K8S_POD_NAMESPACE, K8S_POD_NAME, K8S_POD_UID types.UnmarshallableString
}

// ParsePod reads the pod from CNI_ARGS ("K=V;K2=V2"). It returns the zero Pod for a container that
// belongs to no pod. It requires name and namespace, but no UID, because cri-dockerd passes none.
// It ignores other plugins' arguments. Errors have code 4.
func ParsePod(args string) (attachment.Pod, error) {
	fields := podArgs{CommonArgs: types.CommonArgs{IgnoreUnknown: true}}
	err := types.LoadArgs(args, &fields)
	pod := attachment.Pod{
		Namespace: string(fields.K8S_POD_NAMESPACE), Name: string(fields.K8S_POD_NAME), UID: string(fields.K8S_POD_UID),
	}
	if err == nil {
		err = pod.Validate()
	}
	if err != nil {
		return attachment.Pod{}, types.NewError(types.ErrInvalidEnvironmentVariables, "CNI_ARGS: "+err.Error(), "")
	}
	return pod, nil
}
