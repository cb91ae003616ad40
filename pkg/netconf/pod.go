package netconf

import (
	"fmt"
	"regexp"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
)

// Pod is the pod that the runtime names in CNI_ARGS.
type Pod struct {
	Namespace string
	Name      string
	UID       string
}

// maxArgs bounds CNI_ARGS. What kubelet's runtimes write has less than 600 bytes.
const maxArgs = 8 << 10

// podArgs are the pod's three arguments and what each may hold: a DNS label and a DNS subdomain (Kubernetes, "Object Names
// and IDs"), and a UID, which is a UUID but for static pods, where it is a hash.
var podArgs = []struct {
	key   string
	max   int
	valid *regexp.Regexp
	field func(*Pod) *string
}{
	{"K8S_POD_NAMESPACE", 63, regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?$`), func(p *Pod) *string { return &p.Namespace }},
	{"K8S_POD_NAME", 253, regexp.MustCompile(`^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$`), func(p *Pod) *string { return &p.Name }},
	{"K8S_POD_UID", 128, regexp.MustCompile(`^[a-zA-Z0-9]([-a-zA-Z0-9]*[a-zA-Z0-9])?$`), func(p *Pod) *string { return &p.UID }},
}

// ParsePod reads the pod from CNI_ARGS ("K=V;K2=V2"). The zero Pod is a container that is no pod: none of the three
// arguments is there. A pod without a name or without a namespace is an error, one without a UID is not: cri-dockerd sends
// none. Other arguments are other plugins' and not looked at. Errors have code 4.
func ParsePod(args string) (Pod, error) {
	var pod Pod
	if len(args) > maxArgs {
		return Pod{}, badArgs("%d bytes are more than %d", len(args), maxArgs)
	}
	for pair := range strings.SplitSeq(args, ";") {
		if pair == "" {
			continue
		}
		key, value, ok := strings.Cut(pair, "=")
		if !ok {
			return Pod{}, badArgs("%s is not of the form key=value", short(pair))
		}
		for _, arg := range podArgs {
			if arg.key != key {
				continue
			}
			field := arg.field(&pod)
			if *field != "" {
				return Pod{}, badArgs("%s is given twice", key)
			}
			if len(value) > arg.max || !arg.valid.MatchString(value) {
				return Pod{}, badArgs("%s: %s is not a valid one of 1 to %d bytes", key, short(value), arg.max)
			}
			*field = value
		}
	}
	if pod != (Pod{}) && (pod.Namespace == "" || pod.Name == "") {
		return Pod{}, badArgs("K8S_POD_NAMESPACE %q and K8S_POD_NAME %q: a pod has both", pod.Namespace, pod.Name)
	}
	return pod, nil
}

func badArgs(format string, args ...any) error {
	return types.NewError(types.ErrInvalidEnvironmentVariables, fmt.Sprintf("CNI_ARGS: "+format, args...), "")
}
