package main

import (
	"fmt"
	"io"
)

const usage = `kube2iam-proxy - gives each pod of this node the credentials of its own IAM role, and no other

Usage:
   kube2iam-proxy [flags]
   kube2iam-proxy ready [--state-dir DIR]   succeed if the proxy of this container serves the node's pods
   kube2iam-proxy live  [--state-dir DIR]   succeed if the proxy of this container is healthy

It runs on every node, on the host's network, beside the CNI plugin kube2iam-cni, which redirects the pods' requests for
169.254.169.254:80 to it. A pod's annotation names its role:

   iam.amazonaws.com/role: my-role

The proxy has every flag of kube2iam. Each flag is also an environment variable: KUBE2IAM_ and its name in capitals
(KUBE2IAM_BASE_ROLE_ARN). The node's own AWS credentials come from the SDK's default chain; they need sts:AssumeRole.

In a pod, the proxy uses the service account. Elsewhere, it needs a kubeconfig:

   kube2iam-proxy --node "$NODE_NAME" --kubeconfig FILE --base-role-arn arn:aws:iam::123456789012:role/pods/
`

func help(w io.Writer) {
	fmt.Fprint(w, usage)
	for _, c := range newFlags(new(options)) {
		fmt.Fprintf(w, "\n%s:\n%s", c.title, c.usages())
	}
	fmt.Fprint(w, "\nOther:\n  -h, --help      show this\n  -v, --version   print the version\n")
}
