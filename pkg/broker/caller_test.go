package broker

import (
	"testing"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/credentials"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
	"github.com/kube2iam-cni/kube2iam-cni/test/testrecord"
)

func TestSessionIsUIDOfRecord(t *testing.T) {
	n, b := newNode(nil)
	dir := attachment.In(t.TempDir())
	n.records = attachment.NewIndex(dir)
	err := dir.Put(testrecord.New("c1", attachment.Pod{Namespace: "ns", Name: "pod-a", UID: "a"}, ip))
	if err != nil {
		t.Fatal(err)
	}
	if got := b.Caller(ip, time.Now()).Session(); got != "a" {
		t.Errorf("%q", got)
	}
}

// forgetful warns what is forgotten from what is let go.
type forgetful struct {
	*node
	forgot []string
}

func (f *forgetful) Forget(uid string) { f.forgot = append(f.forgot, uid); f.node.Forget(uid) }

func TestPodWithInvalidRoleIsNotForgotten(t *testing.T) {
	n, b := newNode(nil)
	f := &forgetful{node: n}
	b.Credentials = f
	b.PodChanged(pod("a", "reader"))
	b.PodChanged(pod("a", "not a role"))
	if len(n.holds) > 0 || len(f.forgot) > 0 {
		t.Errorf("holds %v, forgot %v", n.holds, f.forgot)
	}
	b.PodGone(pod("a", ""))
	if len(f.forgot) != 1 {
		t.Errorf("forgot %v", f.forgot)
	}
}

func TestNamespaceChangeAffectsItsPodsOnly(t *testing.T) {
	n, b := newNode(nil)
	other := pod("b", "not a role")
	other.Namespace = "other"
	b.PodChanged(other)
	n.warnings = nil
	b.NamespaceChanged("ns")
	if len(n.warnings) > 0 {
		t.Errorf("warnings %q", n.warnings)
	}
}

func TestMalformedIsForbidden(t *testing.T) {
	if r := refuseCredentials(pod("a", ""), roles.Assumption{}, &credentials.Error{Kind: credentials.Malformed, Code: "PackedPolicyTooLarge"}); r.Status != 403 || r.Code == "" {
		t.Errorf("%+v", r)
	}
}
