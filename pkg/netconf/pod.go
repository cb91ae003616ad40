package netconf

import (
	"fmt"
	"strings"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
)

// maxArgs bounds CNI_ARGS. The kubelet's runtimes write less than 600 bytes.
const maxArgs = 8 << 10

// ParsePod reads the pod from CNI_ARGS ("K=V;K2=V2"). It returns the zero Pod for a container that
// belongs to no pod. It requires name and namespace, but no UID, because cri-dockerd passes none. It
// ignores other plugins' arguments, which types.LoadArgs would refuse. Errors have code 4.
func ParsePod(args string) (attachment.Pod, error) {
	var pod attachment.Pod
	fields := map[string]*string{
		"K8S_POD_NAMESPACE": &pod.Namespace, "K8S_POD_NAME": &pod.Name, "K8S_POD_UID": &pod.UID,
	}
	if len(args) > maxArgs {
		return attachment.Pod{}, invalidArgs("%d bytes are more than %d", len(args), maxArgs)
	}
	for pair := range strings.SplitSeq(args, ";") {
		if pair == "" {
			continue
		}
		key, value, ok := strings.Cut(pair, "=")
		if !ok {
			return attachment.Pod{}, invalidArgs("%s is not of the form key=value", quote(pair))
		}
		field := fields[key]
		switch {
		case field == nil:
			continue
		case *field != "":
			return attachment.Pod{}, invalidArgs("%s is given twice", key)
		case value == "":
			return attachment.Pod{}, invalidArgs("%s is empty", key)
		}
		*field = value
	}
	if err := pod.Validate(); err != nil {
		return attachment.Pod{}, invalidArgs("%v", err)
	}
	return pod, nil
}

func invalidArgs(format string, args ...any) error {
	return types.NewError(types.ErrInvalidEnvironmentVariables, fmt.Sprintf("CNI_ARGS: "+format, args...), "")
}
