package netconf

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
)

func TestParsePod(t *testing.T) {
	for name, tc := range map[string]struct {
		args string
		want attachment.Pod
	}{
		"no arguments": {"", attachment.Pod{}},
		"containerd": {
			"IgnoreUnknown=1;K8S_POD_NAMESPACE=team-a;K8S_POD_NAME=web-0;K8S_POD_INFRA_CONTAINER_ID=0a1b;" +
				"K8S_POD_UID=5f0f4f62-9d1b-4a57-8a4f-0f1d8f3b6f7e",
			attachment.Pod{Namespace: "team-a", Name: "web-0", UID: "5f0f4f62-9d1b-4a57-8a4f-0f1d8f3b6f7e"},
		},
		"a static pod's UID":       {"K8S_POD_NAMESPACE=kube-system;K8S_POD_NAME=etcd-n;K8S_POD_UID=ed8b9b0c2a4b4f0a", attachment.Pod{Namespace: "kube-system", Name: "etcd-n", UID: "ed8b9b0c2a4b4f0a"}},
		"no UID":                   {"K8S_POD_NAMESPACE=a;K8S_POD_NAME=b.c", attachment.Pod{Namespace: "a", Name: "b.c"}},
		"other plugins' arguments": {"IP=10.0.0.1;X=", attachment.Pod{}},
		"the longest":              {"K8S_POD_NAMESPACE=" + strings.Repeat("n", 63) + ";K8S_POD_NAME=" + strings.Repeat("p", 253), attachment.Pod{Namespace: strings.Repeat("n", 63), Name: strings.Repeat("p", 253)}},
		"a key in lower case":      {"k8s_pod_name=../..", attachment.Pod{}},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := ParsePod(tc.args)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestParsePodRefuses(t *testing.T) {
	const pod = "K8S_POD_NAMESPACE=a;K8S_POD_NAME=b;"
	for name, tc := range map[string]struct{ args, want string }{
		"no pair":             {pod + "X", `CNI_ARGS: ARGS: invalid pair "X"`},
		"no namespace":        {"K8S_POD_NAME=b", `CNI_ARGS: pod namespace "": not a DNS label (RFC 1123)`},
		"no name":             {"K8S_POD_NAMESPACE=a", `CNI_ARGS: pod name "": not a DNS subdomain (RFC 1123)`},
		"only a UID":          {"K8S_POD_UID=c", `CNI_ARGS: pod namespace "": not a DNS label (RFC 1123)`},
		"an empty name":       {"K8S_POD_NAMESPACE=a;K8S_POD_NAME=", `CNI_ARGS: pod name "": not a DNS subdomain (RFC 1123)`},
		"upper case":          {"K8S_POD_NAMESPACE=A", `CNI_ARGS: pod namespace "A": not a DNS label (RFC 1123)`},
		"a namespace's dot":   {"K8S_POD_NAMESPACE=a.b", `CNI_ARGS: pod namespace "a.b": not a DNS label (RFC 1123)`},
		"a path":              {"K8S_POD_NAMESPACE=../a", `CNI_ARGS: pod namespace "../a": not a DNS label (RFC 1123)`},
		"a line break at end": {"K8S_POD_NAMESPACE=a\n", `CNI_ARGS: pod namespace "a\n": not a DNS label (RFC 1123)`},
		"a long namespace":    {"K8S_POD_NAMESPACE=" + strings.Repeat("n", 64), `CNI_ARGS: pod namespace "` + strings.Repeat("n", 64) + `": not a DNS label (RFC 1123)`},
		"a UID with a space":  {pod + "K8S_POD_UID=a b", `CNI_ARGS: pod UID "a b": not 1 to 128 letters, digits and '-'`},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := ParsePod(tc.args)
			wantCNIError(t, got, err, 4, tc.want)
		})
	}
}
