package broker

import (
	"strings"
	"testing"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/credentials"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
)

// TestEvents checks which mistakes become Events, and their messages.
func TestEvents(t *testing.T) {
	n, b := newNode(restricted)
	n.namespaces["ns"] = map[string]string{"allowed": `["reader"]`}
	warns := func(what string, want ...string) {
		t.Helper()
		if len(n.warnings) != len(want) {
			t.Fatalf("%s: warnings %q", what, n.warnings)
		}
		for i := range want {
			if !strings.HasPrefix(n.warnings[i], want[i]) {
				t.Errorf("%s: warnings %q, want %q", what, n.warnings[i], want[i])
			}
		}
		n.warnings = nil
	}
	b.PodChanged(pod("a", ""))
	warns("no annotation")
	b.PodChanged(pod("a", "not a role"))
	warns("malformed", `ns/pod-a IAMRoleInvalid: iam.amazonaws.com/role: "arn:aws:iam::123456789012:role/not a role" is not the ARN`)
	b.PodChanged(pod("a", "not a role"))
	warns("malformed as before", "ns/pod-a IAMRoleInvalid")
	n.pod = pod("a", "not a role")
	for range 2 {
		if _, _, err := b.Caller(ip, time.Now()).Role(t.Context()); err == nil {
			t.Error("a role")
		}
	}
	warns("and asked for", "ns/pod-a IAMRoleInvalid", "ns/pod-a IAMRoleInvalid")
	n.pod = pod("deleted", "not a role")
	if _, _, err := b.Caller(ip, time.Now()).Role(t.Context()); err == nil {
		t.Error("a role")
	}
	warns("a deleted pod")
	b.PodChanged(pod("a", "admin"))
	warns("forbidden", "ns/pod-a IAMRoleForbidden: namespace ns: role "+base+"admin: the namespace does not allow the role")
	b.PodChanged(pod("a", "reader"))
	warns("right")
	a := roles.Assumption{RoleARN: base + "reader", SessionName: "ns.pod-a", Duration: time.Hour}
	secret := "User: arn:aws:sts::123456789012:assumed-role/node/i-1 is not authorized"
	b.AssumeRoleFailed("a", a, &credentials.Error{Kind: credentials.Denied, Code: "AccessDenied", Message: secret})
	b.AssumeRoleFailed("a", a, &credentials.Error{Kind: credentials.Malformed, Code: "PackedPolicyTooLarge", Message: secret})
	b.AssumeRoleFailed("a", a, &credentials.Error{Kind: credentials.Throttled, Code: "Throttling", Message: secret})
	for _, warning := range n.warnings {
		if strings.Contains(warning, "assumed-role/node") {
			t.Errorf("%q names the node's role", warning)
		}
	}
	warns("failures", "ns/pod-a IAMRoleDenied: STS refused to let the node assume the role "+base+"reader: AccessDenied",
		"ns/pod-a IAMRoleDenied: STS refused to let the node assume the role "+base+"reader: PackedPolicyTooLarge",
		"ns/pod-a IAMRoleThrottled: STS is asked too often (Throttling)")
	for _, err := range []credentials.Error{
		{Kind: credentials.Unavailable, Code: "RequestError", Message: secret},
		{Kind: credentials.NodeCredentials, Code: "NoCredentialProviders", Message: secret},
		{Kind: credentials.ClockSkew, Code: "SignatureDoesNotMatch", Message: secret, Cause: "the node's clock is 23 minutes behind the clock of STS"},
		{Kind: credentials.Denied, Code: "AccessDenied", Message: secret, Cause: "this node lacks the permission sts:AssumeRole on the role"},
	} {
		b.AssumeRoleFailed("a", a, &err)
	}
	for _, warning := range n.warnings {
		if strings.Contains(warning, "assumed-role/node") {
			t.Errorf("%q names the node's role", warning)
		}
	}
	warns("failures of the node", "ns/pod-a IAMSTSUnavailable: STS cannot be reached from this node, or does not answer (RequestError)",
		"ns/pod-a IAMNodeCredentialsMissing: This node has no AWS credentials of its own that STS accepts (NoCredentialProviders)",
		"ns/pod-a IAMNodeClockSkew: STS does not accept this node's time: the node's clock is 23 minutes behind the clock of STS.",
		"ns/pod-a IAMRoleDenied: STS refused to let the node assume the role "+base+"reader: AccessDenied: this node lacks the permission sts:AssumeRole on the role.")
	b.AssumeRoleFailed("b", a, &credentials.Error{Kind: credentials.Denied})
	a.RoleARN += "x"
	b.AssumeRoleFailed("a", a, &credentials.Error{Kind: credentials.Denied})
	warns("an assumption that no pod holds")
}

func TestEventForHostNetworkPodWithAnnotation(t *testing.T) {
	n, b := newNode(nil)
	host := pod("a", "reader")
	host.HostNetwork = true
	for range 2 {
		b.PodChanged(host)
	}
	if len(n.warnings) == 0 || !strings.HasPrefix(n.warnings[0], "ns/pod-a IAMRoleIgnored: the pod is on the host's network") {
		t.Errorf("warnings %q", n.warnings)
	}
	if len(n.holds) > 0 {
		t.Errorf("holds %v", n.holds)
	}
	n.warnings = nil
	plain := pod("b", "")
	plain.HostNetwork = true
	b.PodChanged(plain)
	if len(n.warnings) > 0 {
		t.Errorf("without the annotation: warnings %q", n.warnings)
	}
}

// TestEventForIntermediateRole has STS refuse the role of --assume-role-arn.
func TestEventForIntermediateRole(t *testing.T) {
	n, b := newNode(nil)
	b.PodChanged(pod("a", "reader"))
	a := roles.Assumption{RoleARN: base + "reader", SessionName: "ns.pod-a", Duration: time.Hour}
	b.AssumeRoleFailed("a", a, &credentials.Error{Kind: credentials.NodeCredentials, Code: "AssumeRoleChainError", Cause: "STS refuses this node the role that --assume-role-arn names"})
	if len(n.warnings) != 1 || !strings.HasPrefix(n.warnings[0], "ns/pod-a IAMNodeCredentialsMissing: This node cannot ask STS for the pod's role: STS refuses this node the role that --assume-role-arn names (AssumeRoleChainError);") {
		t.Errorf("warnings %q", n.warnings)
	}
}
