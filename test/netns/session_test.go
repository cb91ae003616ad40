package netns

import (
	"encoding/json"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/kube2iam-cni/kube2iam-cni/test/sts"
	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

// annotated is a running pod with these annotations besides its role.
func (n *node) annotated(name, role string, annotations map[string]string) *testbed.Sandbox {
	n.t.Helper()
	all := map[string]string{roleKey: role}
	for k, v := range annotations {
		all["iam.amazonaws.com/"+k] = v
	}
	s, err := n.RunPod(n.t.Context(), "default", name, all)
	n.must(err)
	return s
}

// accessKey is that of the pod's credentials.
func (n *node) accessKey(s *testbed.Sandbox, role string) string {
	n.t.Helper()
	got := n.get(s, credentials+role)
	var doc struct{ AccessKeyID string }
	if got.status != http.StatusOK || json.Unmarshal([]byte(got.body), &doc) != nil || doc.AccessKeyID == "" {
		n.t.Fatalf("%s asks for %s: %s, want credentials", s.Name, role, got)
	}
	return doc.AccessKeyID
}

// issued is the call of STS that issued an access key.
func (n *node) issued(key string) sts.Call {
	n.t.Helper()
	for _, call := range n.STS.Calls() {
		if call.Issued == key {
			return call
		}
	}
	n.t.Fatalf("STS did not issue %s", key)
	return sts.Call{}
}

// TestSessions is what STS is told of a session: its name, its source identity, its tags and its
// policy.
func TestSessions(t *testing.T) {
	onThese(t, []setup{routed}, func(t *testing.T, n *node) {
		n.proxy(append(impatient, "--session-tags", "--cluster-name", "prod", "--source-identity")...)
		const policy = `{"Statement": [{"Effect": "Allow", "Action": "s3:GetObject", "Resource": "*"}]}`
		pod := n.annotated("pod", "app", map[string]string{"session-name": "nightly", "session-policy": policy})
		call := n.issued(n.accessKey(pod, "app"))
		want := map[string]string{
			"eks-cluster-name": "prod", "kubernetes-namespace": "default", "kubernetes-service-account": "default",
			"kubernetes-pod-name": "pod", "kubernetes-pod-uid": pod.UID,
		}
		if d := cmp.Diff(want, call.Tags); d != "" {
			t.Errorf("the session's tags (-want +got):\n%s", d)
		}
		if call.SessionName != "nightly" || call.SourceIdentity != "default.pod" || call.Policy != strings.ReplaceAll(policy, " ", "") || call.Duration != time.Hour {
			t.Errorf("STS saw %+v", call)
		}
		// A name that is another's is none.
		thief := n.annotated("thief", "app", map[string]string{"session-name": "kube-system.admin"})
		n.wantStatus(thief, credentials, http.StatusNotFound)
	})
}

// TestSharedSessions has the pods of a node share the sessions of their roles.
func TestSharedSessions(t *testing.T) {
	onThese(t, []setup{routed}, func(t *testing.T, n *node) {
		n.proxy(append(impatient, "--session-scope", "role")...)
		n.PutRole("external", "secret")
		a, b, c := n.run("a", "app"), n.run("b", "app"), n.run("c", "other")
		own := n.annotated("own", "external", map[string]string{"external-id": "secret"})
		stranger := n.annotated("stranger", "external", map[string]string{"external-id": "guess"})
		key := n.accessKey(a, "app")
		if n.accessKey(b, "app") != key || n.accessKey(c, "other") == key {
			t.Error("pods of one role have other keys, or those of another have the same")
		}
		if call := n.issued(key); call.SessionName != "_kube2iam."+testbed.NodeName {
			t.Errorf("the session is %s's", call.SessionName)
		}
		// What else goes into AssumeRole is nobody else's.
		n.accessKey(own, "external")
		if got := n.get(stranger, credentials+"external"); !strings.Contains(got.body, "AssumeRoleUnauthorizedAccess") {
			t.Errorf("with another external ID: %s", got)
		}
	})
}

// TestChainedRoles has the node assume a role that alone may assume the pods', for longer than STS
// grants that.
func TestChainedRoles(t *testing.T) {
	onThese(t, []setup{routed}, func(t *testing.T, n *node) {
		between := n.PutRole("between", "")
		n.STS.PutRole(sts.Role{ARN: testbed.RoleBase + "behind", Trusts: []string{between}, MaxDuration: 12 * time.Hour})
		p := n.proxy(append(impatient, "--assume-role-arn", between, "--iam-role-session-ttl", "2h")...)
		pod := n.run("pod", "behind")
		call := n.issued(n.accessKey(pod, "behind"))
		if call.Duration != time.Hour || n.issued(call.AccessKeyID).RoleARN != between {
			t.Errorf("STS saw %+v", call)
		}
		if !strings.Contains(p.Log(), "STS limits the sessions of chained roles") {
			t.Error("the log does not say that sessions are shorter")
		}
	})
}

// TestEventsSayWhatIsWrong has pods whose mistakes their owners find on them.
func TestEventsSayWhatIsWrong(t *testing.T) {
	onThese(t, []setup{routed}, func(t *testing.T, n *node) {
		n.KubeAPI.PutNamespace("default", map[string]string{"iam.amazonaws.com/permitted": "app|nobody"})
		n.proxy(append(impatient, "--namespace-restrictions")...)
		n.run("fine", "app")
		n.run("plain", "")
		want := map[string]string{
			n.run("denied", "nobody").Name:     "IAMRoleDenied",
			n.run("forbidden", "other").Name:   "IAMRoleForbidden",
			n.run("malformed", "no role").Name: "IAMRoleInvalid",
		}
		found := func() map[string]string {
			all := map[string]string{}
			for _, e := range n.KubeAPI.Events() {
				all[e.InvolvedObject.Name] = e.Reason
				if strings.Contains(e.Message, "assumed-role/"+testbed.NodeRole) || e.Source.Component != "kube2iam-cni" {
					t.Errorf("%s: %s", e.Source.Component, e.Message)
				}
			}
			return all
		}
		n.KubeAPI.PutPod(&corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "host", Annotations: map[string]string{roleKey: "app"}},
			Spec:       corev1.PodSpec{NodeName: testbed.NodeName, HostNetwork: true},
		})
		want["host"] = "IAMRoleIgnored"
		n.eventually(func() bool { return len(found()) >= len(want) })
		if d := cmp.Diff(want, found()); d != "" {
			t.Errorf("events (-want +got):\n%s", d)
		}
		// It is mended, and no word is needed for it to be so.
		n.KubeAPI.PutNamespace("default", map[string]string{"iam.amazonaws.com/permitted": ".*"})
		late := n.run("late", "other")
		n.eventually(func() bool { return n.get(late, credentials).status == http.StatusOK })
		n.wantOwn(late, "other")
		n.STS.Down()
		n.run("unserved", "app")
		n.eventually(func() bool { return found()["unserved"] == "IAMSTSUnavailable" })
	})
}

// TestEventsNameTheNodesFaults has a node without credentials of its own, then one whose clock is
// off.
func TestEventsNameTheNodesFaults(t *testing.T) {
	onThese(t, []setup{routed}, func(t *testing.T, n *node) {
		event := func(pod *testbed.Sandbox, reason string, parts ...string) {
			t.Helper()
			var message string
			n.eventually(func() bool {
				for _, e := range n.KubeAPI.Events() {
					if e.InvolvedObject.Name == pod.Name && e.Reason == reason {
						message = e.Message
					}
				}
				return message != ""
			})
			for _, part := range parts {
				if !strings.Contains(message, part) {
					t.Errorf("%s: %q has no %q", reason, message, part)
				}
			}
			if strings.Contains(message, "404 - Not Found") || strings.Contains(message, "assumed-role/"+testbed.NodeRole) {
				t.Errorf("%s tells the pod's owner what is not theirs: %s", reason, message)
			}
		}
		served := func(pod *testbed.Sandbox) {
			t.Helper()
			n.eventually(func() bool { return n.get(pod, credentials+"app").status == http.StatusOK })
			n.wantOwn(pod, "app")
		}

		n.IMDS.SetMissing(credentials)
		p := n.proxy(impatient...)
		first := n.run("first", "app")
		n.wantStatus(first, credentials+"app", http.StatusInternalServerError)
		event(first, "IAMNodeCredentialsMissing", "NoCredentialProviders", testbed.RoleBase+"app")
		var logged bool
		for line := range strings.Lines(p.Log()) {
			logged = logged || strings.Contains(line, "credentials not obtained") && strings.Contains(line, "NoCredentialProviders") &&
				strings.Contains(line, "no EC2 instance role found") && strings.Contains(line, "404 - Not Found")
			if strings.Contains(line, "Deprecated") {
				t.Errorf("the log has the SDK's own advice: %s", line)
			}
		}
		if !logged {
			t.Error("the log does not have the answer of the metadata service")
		}
		n.IMDS.SetMissing("")
		served(first)

		n.SetSTSClock(23 * time.Minute)
		second := n.run("second", "app")
		n.wantStatus(second, credentials+"app", http.StatusInternalServerError)
		event(second, "IAMNodeClockSkew", "the node's clock is 23 minutes behind the clock of STS", testbed.RoleBase+"app")
		n.SetSTSClock(0)
		served(second)
	})
}
