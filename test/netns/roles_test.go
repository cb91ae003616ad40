package netns

import (
	"encoding/json"
	"net/http"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/test/kubeapi"
	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

// pending is a pod that the API server knows, in a sandbox that has not been added: neither has an
// IP.
func (n *node) pending(name, role string) *testbed.Sandbox {
	n.t.Helper()
	pod := n.KubeAPI.PutPod(kubeapi.NewPod(testbed.NodeName, "default", name, map[string]string{roleKey: role}))
	s, err := n.NewSandbox("default", name, string(pod.UID))
	n.must(err)
	return s
}

// impatient is the proxy's flags for tests of addresses that do not become known: by default it
// waits two seconds for each.
var impatient = []string{"--backoff-max-elapsed-time", "100ms"}

// TestOthersRoles is who gets what of three pods: the rightful owner, one with another role, one
// without.
func TestOthersRoles(t *testing.T) {
	onFew(t, func(t *testing.T, n *node) {
		n.proxy()
		a, b, plain := n.run("a", "app"), n.run("b", "other"), n.run("plain", "")
		n.wantOwn(a, "app")
		n.wantOwn(b, "other")

		n.wantStatus(b, credentials+"app", http.StatusNotFound)
		n.wantStatus(a, credentials+"other", http.StatusNotFound)
		n.wantStatus(plain, credentials+"app", http.StatusNotFound)
		n.wantStatus(plain, credentials, http.StatusNotFound)
		// The node's own, and every other spelling of the way to it.
		for _, path := range []string{
			credentials + testbed.NodeRole,
			"/latest/meta-data/iam/security-credentials-extended/" + testbed.NodeRole,
			"/latest/meta-data/identity-credentials/ec2/security-credentials/ec2-instance",
			"/latest/meta-data/x/../iam/security-credentials/" + testbed.NodeRole,
			"/latest/meta-data/iam%2Fsecurity-credentials%2F" + testbed.NodeRole,
			"/2021-07-15/meta-data//iam/security-credentials/" + testbed.NodeRole,
			"/latest/meta-data/IAM/Security-Credentials/" + testbed.NodeRole,
		} {
			for _, pod := range []*testbed.Sandbox{b, plain} {
				n.wantStatus(pod, path, http.StatusNotFound)
			}
		}
		for _, call := range n.STS.Calls() {
			if call.RoleARN == testbed.RoleBase+testbed.NodeRole || call.RoleARN == testbed.RoleBase ||
				call.RoleARN == testbed.RoleBase+"app" && call.SessionName != "default.a" {
				t.Errorf("STS was asked for %s in the name of %s", call.RoleARN, call.SessionName)
			}
		}
	})
}

// TestUnknownRole is an annotation with a role that STS does not have, or does not let the node
// assume.
func TestUnknownRole(t *testing.T) {
	onFew(t, func(t *testing.T, n *node) {
		n.proxy()
		n.PutRole("external", "secret")
		for _, role := range []string{"nobody", "external"} {
			pod := n.run("pod-"+role, role)
			got := n.get(pod, credentials+role)
			var doc struct{ Code, Message, AccessKeyID string }
			if got.status != http.StatusForbidden || json.Unmarshal([]byte(got.body), &doc) != nil ||
				doc.Code != "AssumeRoleUnauthorizedAccess" || doc.Message == "" || doc.AccessKeyID != "" {
				t.Errorf("%s: %s, want a document with AssumeRoleUnauthorizedAccess", role, got)
			}
		}
	})
}

// TestReusedAddress is an IP that goes from a pod with role app to another pod, at each stage of
// what the API server knows.
func TestReusedAddress(t *testing.T) {
	onEach(t, func(t *testing.T, n *node) {
		n.proxy(impatient...)
		ctx := t.Context()
		first := n.run("first", "app")
		n.wantOwn(first, "app")
		n.must(n.StopPod(ctx, first))

		// Nothing reports the IP: the heir's status has none yet.
		second := n.pending("second", "other")
		second.IP = first.IP
		n.must(n.Add(ctx, second))
		if second.IP != first.IP {
			t.Fatalf("the heir has %s, want %s", second.IP, first.IP)
		}
		n.wantSession(second, "other", n.get(second, credentials+"other"))
		n.wantStatus(second, credentials+"app", http.StatusNotFound)
		n.must(n.KubeAPI.SetStatus("default", "second", corev1.PodRunning, second.IP.String()))
		n.wantOwn(second, "other")
		n.wantStatus(second, credentials+"app", http.StatusNotFound)

		// The former owner is gone from the node, and its object still says that it runs and has the IP.
		n.must(n.Del(ctx, second.Runtime()))
		n.must(second.Netns.Close())
		third := n.pending("third", "app")
		third.IP = first.IP
		n.must(n.Add(ctx, third))
		n.wantStatus(third, credentials, http.StatusNotFound)
		n.wantStatus(third, credentials+"other", http.StatusNotFound)
		n.wantStatus(third, credentials+"app", http.StatusNotFound)
		n.must(n.KubeAPI.DeletePod("default", "second"))
		n.eventually(func() bool { return n.get(third, credentials+"app").status == http.StatusOK })
		n.wantOwn(third, "app")

		// The former owner's DEL never came. Its veth goes with its netns, a little later: before,
		// ptp would keep its route.
		record, err := attachment.In(n.StateDir).Holder(third.IP)
		n.must(err)
		n.must(third.Netns.Close())
		n.eventually(func() bool {
			_, err := n.Node.Run(ctx, n.ClientEnv(), "ip", "link", "show", "dev", record.HostLink.Name)
			return err != nil
		})
		n.must(n.KubeAPI.DeletePod("default", "third"))
		n.must(n.forgetAddresses())
		fourth := n.pending("fourth", "other")
		fourth.IP = first.IP
		n.must(n.Add(ctx, fourth))
		n.wantSession(fourth, "other", n.get(fourth, credentials+"other"))
		n.wantStatus(fourth, credentials+"app", http.StatusNotFound)
	})
}

// TestUnknownPod is an address that belongs to a container that is no pod, or to a pod that the API
// server does not have.
func TestUnknownPod(t *testing.T) {
	onFew(t, func(t *testing.T, n *node) {
		n.proxy(impatient...)
		ctx := t.Context()
		stranger, err := n.NewSandbox("default", "stranger", "b0e4e8f2-0000-4000-8000-000000000001")
		n.must(err)
		n.must(n.Add(ctx, stranger))
		n.wantStatus(stranger, credentials, http.StatusNotFound)
		n.wantStatus(stranger, credentials+"app", http.StatusNotFound)

		// Of the same name as one that there is, but not that one.
		n.run("namesake", "app")
		impostor, err := n.NewSandbox("default", "namesake", "b0e4e8f2-0000-4000-8000-000000000002")
		n.must(err)
		n.must(n.Add(ctx, impostor))
		n.wantStatus(impostor, credentials+"app", http.StatusNotFound)

		gone := n.run("gone", "app")
		n.wantOwn(gone, "app")
		n.must(n.KubeAPI.DeletePod("default", "gone"))
		n.eventually(func() bool { return n.get(gone, credentials+"app").status == http.StatusNotFound })
	})
}
