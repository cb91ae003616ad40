//go:build cluster

package cluster

import (
	"context"
	"fmt"
	"strings"
	"testing"
)

// testEvents starts a pod with a malformed role and a pod in a namespace that allows no role. The
// proxy writes Events on them, with the permissions of its service account.
func testEvents(t *testing.T, n *node, _ *cloud) {
	t.Cleanup(func() {
		ctx := context.WithoutCancel(t.Context()) // t.Context() is already cancelled
		if _, err := n.output(ctx, nil, "kubectl", "delete", "--filename="+testdata(t, "wrong.yaml")); err != nil {
			t.Error(err)
		}
	})
	// Either the controller or this test creates the service account of the new namespace.
	await(t, podLimit, "the pods created", func(ctx context.Context) error {
		_, err := n.output(ctx, nil, "kubectl", "apply", "--filename="+testdata(t, "wrong.yaml"))
		return err
	})
	for pod, reason := range map[string]string{"default/malformed": "IAMRoleInvalid", "strict/forbidden": "IAMRoleForbidden"} {
		namespace, name, _ := strings.Cut(pod, "/")
		await(t, podLimit, reason+" on "+pod, func(ctx context.Context) error {
			got, err := n.output(ctx, nil, "kubectl", "get", "events", "--namespace="+namespace, "--field-selector=involvedObject.name="+name+",reason="+reason,
				"--output=jsonpath={.items[*].source.component}")
			if err == nil && got != "kube2iam-cni" {
				err = fmt.Errorf("its events are of %q", got)
			}
			return err
		})
	}
}
