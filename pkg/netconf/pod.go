package netconf

import (
	"fmt"
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
	inner string // what it may hold besides lower-case letters and digits, but for its ends
	upper bool   // whether it may hold upper-case letters
	field func(*Pod) *string
}{
	{"K8S_POD_NAMESPACE", 63, "-", false, func(p *Pod) *string { return &p.Namespace }},
	{"K8S_POD_NAME", 253, "-.", false, func(p *Pod) *string { return &p.Name }},
	{"K8S_POD_UID", 128, "-", true, func(p *Pod) *string { return &p.UID }},
}

// validArg is by hand, not by a regular expression, which would have to be compiled at each start of the plugin.
func validArg(value string, max int, inner string, upper bool) bool {
	if value == "" || len(value) > max {
		return false
	}
	for i := range len(value) {
		c := value[i]
		switch {
		case 'a' <= c && c <= 'z', '0' <= c && c <= '9', upper && 'A' <= c && c <= 'Z':
		case i > 0 && i < len(value)-1 && strings.IndexByte(inner, c) >= 0:
		default:
			return false
		}
	}
	return true
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
			if !validArg(value, arg.max, arg.inner, arg.upper) {
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
