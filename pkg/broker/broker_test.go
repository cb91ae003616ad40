package broker

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/credentials"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/imds"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/pods"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
	"github.com/kube2iam-cni/kube2iam-cni/test/testrecord"
)

const (
	roleKey = "iam.amazonaws.com/role"
	base    = "arn:aws:iam::123456789012:role/"
)

var ip = netip.MustParseAddr("10.0.0.1")

// node is one node: a pod behind the address, and a cache that remembers what it is asked.
type node struct {
	pod    *pods.Pod
	podErr error
	credit error
	holds  map[string]string
	asked  []roles.Assumption
	// during is called while STS is called.
	during     func()
	records    *attachment.Index
	namespaces map[string]map[string]string
	notShown   chan struct{} // closed when the API shows the namespaces; nil where it has
	warnings   []string
}

func (n *node) Source(ip netip.Addr) pods.Source {
	if n.records == nil {
		return pods.Source{IP: ip}
	}
	return pods.NewResolver(pods.ResolverConfig{Records: n.records}).Source(ip)
}
func (n *node) Resolve(context.Context, pods.Source) (*pods.Pod, error) { return n.pod, n.podErr }
func (n *node) Hold(uid string, a roles.Assumption)                     { n.holds[uid] = a.RoleName() }
func (n *node) Release(uid string)                                      { delete(n.holds, uid) }
func (n *node) Forget(uid string)                                       { delete(n.holds, uid) }
func (n *node) Get(_ context.Context, pod string, a roles.Assumption) (*credentials.Document, error) {
	if pod != string(n.pod.UID) {
		return nil, fmt.Errorf("%q asks, and the pod is %q", pod, n.pod.UID)
	}
	n.asked = append(n.asked, a)
	if n.during != nil {
		n.during()
	}
	return new(credentials.Document), n.credit
}

func (n *node) Warn(p *pods.Pod, reason, message string) {
	n.warnings = append(n.warnings, p.String()+" "+reason+": "+message)
}

func (n *node) Annotations(ctx context.Context, namespace string) (map[string]string, error) {
	if n.notShown != nil {
		select {
		case <-n.notShown:
		case <-ctx.Done():
			select {
			case <-n.notShown:
			default:
				return nil, pods.ErrNotShown
			}
		}
	}
	if a, ok := n.namespaces[namespace]; ok {
		return a, nil
	}
	return nil, pods.ErrNoNamespace
}

func newNode(change func(*roles.Rules)) (*node, *Broker) {
	n := &node{holds: map[string]string{}, namespaces: map[string]map[string]string{}}
	rules := &roles.Rules{RoleKey: roleKey, ExternalIDKey: "id", BaseARN: base, Duration: time.Hour}
	if change != nil {
		change(rules)
	}
	return n, New(Config{Pods: n, Rules: rules, Credentials: n, Namespaces: n, Recorder: n})
}

func pod(uid, role string) *pods.Pod {
	p := &pods.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "pod-" + uid, UID: types.UID(uid)}}
	if role != "" {
		p.Annotations = map[string]string{roleKey: role}
	}
	return p
}

func TestPodGetsItsRole(t *testing.T) {
	n, b := newNode(nil)
	n.pod = pod("a", "reader")
	name, arn, err := b.Caller(ip, time.Now()).Role(t.Context())
	if name != "reader" || arn != base+"reader" || err != nil {
		t.Errorf("%s, %s, %v", name, arn, err)
	}
	if _, err := b.Caller(ip, time.Now()).Credentials(t.Context(), "reader"); err != nil {
		t.Error(err)
	}
	want := []roles.Assumption{{RoleARN: base + "reader", SessionName: "ns.pod-a", Duration: time.Hour}}
	if d := cmp.Diff(want, n.asked); d != "" {
		t.Error(d)
	}
}

func TestStatusOfRefusals(t *testing.T) {
	for name, tt := range map[string]struct {
		arrange func(*node)
		role    string
		status  int
	}{
		"unknown address":    {func(n *node) { n.podErr = pods.ErrUnknown }, "reader", 404},
		"ambiguous address":  {func(n *node) { n.podErr = fmt.Errorf("x: %w", pods.ErrAmbiguous) }, "reader", 404},
		"finished pod":       {func(n *node) { n.podErr = pods.ErrFinished }, "reader", 404},
		"no pod":             {func(n *node) { n.podErr = pods.ErrNotAPod }, "reader", 404},
		"API down":           {func(n *node) { n.podErr = pods.ErrUnavailable }, "reader", 500},
		"API asked often":    {func(n *node) { n.podErr = pods.ErrAskedTooOften }, "reader", 500},
		"no annotation":      {func(n *node) { n.pod = pod("a", "") }, "reader", 404},
		"malformed":          {func(n *node) { n.pod = pod("a", "not a role") }, "reader", 404},
		"another role":       {func(n *node) {}, "writer", 404},
		"the role's ARN":     {func(n *node) {}, base + "reader", 404},
		"denied by STS":      {func(n *node) { n.credit = &credentials.Error{Kind: credentials.Denied, Code: "AccessDenied"} }, "reader", 403},
		"throttled by STS":   {func(n *node) { n.credit = &credentials.Error{Kind: credentials.Throttled} }, "reader", 500},
		"STS down":           {func(n *node) { n.credit = &credentials.Error{Kind: credentials.Unavailable} }, "reader", 500},
		"node's credentials": {func(n *node) { n.credit = &credentials.Error{Kind: credentials.NodeCredentials} }, "reader", 500},
		"shutting down":      {func(n *node) { n.credit = credentials.ErrClosed }, "reader", 500},
	} {
		t.Run(name, func(t *testing.T) {
			n, b := newNode(nil)
			n.pod = pod("a", "reader")
			tt.arrange(n)
			doc, err := b.Caller(ip, time.Now()).Credentials(t.Context(), tt.role)
			refusal, ok := errors.AsType[*imds.Refusal](err)
			if !ok || doc != nil || refusal.Status != tt.status {
				t.Fatalf("%v, %v; want status %d", doc, err, tt.status)
			}
			if (refusal.Code != "") != (tt.status == 403) {
				t.Errorf("code %q with status %d", refusal.Code, tt.status)
			}
			if refusal.Pod == "" {
				t.Error("the log could not name who it was")
			}
		})
	}
}

func TestAddressReusedDuringRequest(t *testing.T) {
	n, b := newNode(nil)
	n.pod = pod("a", "reader")
	dir := attachment.In(t.TempDir())
	n.records = attachment.NewIndex(dir)
	hold := func(container, uid string) {
		err := dir.Put(testrecord.New(container, attachment.Pod{Namespace: "ns", Name: "pod-" + uid, UID: uid}, ip))
		if err != nil {
			t.Fatal(err)
		}
	}
	hold("c1", "a")
	ask := func() error {
		_, err := b.Caller(ip, time.Now()).Credentials(t.Context(), "reader")
		return err
	}
	slowly := func() { <-time.After(2 * minAddressReuse) }
	n.during = slowly
	if err := ask(); err != nil {
		t.Errorf("the same pod: %v", err)
	}
	n.during = func() { hold("c2", "b"); slowly() }
	if err := ask(); !errors.Is(err, errAddressReused) {
		t.Errorf("another pod: %v", err)
	}
	hold("c1", "a")
	n.during = func() {
		if err := dir.Delete("c1", "eth0"); err != nil {
			t.Error(err)
		}
		slowly()
	}
	if err := ask(); !errors.Is(err, errAddressReused) {
		t.Errorf("no pod: %v", err)
	}
}

func TestPodDoesNotLearnNodeRole(t *testing.T) {
	n, b := newNode(nil)
	n.pod = pod("a", "reader")
	n.credit = &credentials.Error{Kind: credentials.Denied, Code: "AccessDenied", Message: "User: arn:aws:sts::1:assumed-role/node-role/i-0 is not authorized"}
	_, err := b.Caller(ip, time.Now()).Credentials(t.Context(), "reader")
	refusal, _ := errors.AsType[*imds.Refusal](err)
	if strings.Contains(refusal.Message, "node-role") || !strings.Contains(refusal.Message, base+"reader") {
		t.Errorf("%q", refusal.Message)
	}
	if !strings.Contains(refusal.Error(), "node-role") {
		t.Error("the log does not tell the operator")
	}
}

func TestChangedAnnotationTakesEffect(t *testing.T) {
	n, b := newNode(nil)
	n.pod = pod("a", "reader")
	b.PodChanged(n.pod)
	if name, _, _ := b.Caller(ip, time.Now()).Role(t.Context()); name != "reader" {
		t.Fatal(name)
	}
	n.pod = pod("a", "writer")
	if name, _, _ := b.Caller(ip, time.Now()).Role(t.Context()); name != "writer" { // before PodChanged is called
		t.Error(name)
	}
	b.PodChanged(n.pod)
	if d := cmp.Diff(map[string]string{"a": "writer"}, n.holds); d != "" {
		t.Error(d)
	}
}

func TestCredentialsAreHeldForRunningPodsWithRole(t *testing.T) {
	n, b := newNode(nil)
	b.PodChanged(pod("a", "reader"))
	b.PodChanged(pod("b", ""))
	b.PodChanged(pod("c", "not a role"))
	for uid, role := range map[string]string{"d": "reader", "e": ""} {
		host := pod(uid, role)
		host.HostNetwork = true
		b.PodChanged(host)
	}
	if d := cmp.Diff(map[string]string{"a": "reader"}, n.holds); d != "" {
		t.Error(d)
	}
	finished := pod("a", "reader")
	finished.Finished = true
	b.PodChanged(finished)
	if len(n.holds) != 0 || len(b.decisions) != 3 { // of b, c and d
		t.Errorf("held %v, %d decisions", n.holds, len(b.decisions))
	}
	for _, uid := range []string{"b", "c", "d"} {
		b.PodGone(pod(uid, ""))
	}
	if len(b.decisions) != 0 {
		t.Errorf("%d decisions are left", len(b.decisions))
	}
}

func TestNamespaceChange(t *testing.T) {
	n, b := newNode(func(r *roles.Rules) { r.Restriction = &roles.Restriction{Key: "allowed", Format: roles.Glob} })
	n.pod = pod("a", "reader")
	b.PodChanged(n.pod)
	status := func() int {
		_, err := b.Caller(ip, time.Now()).Credentials(t.Context(), "reader")
		if refusal, ok := errors.AsType[*imds.Refusal](err); ok {
			return refusal.Status
		}
		return 0
	}
	if got := status(); got != 500 {
		t.Errorf("namespace not known: %d", got)
	}
	for allowed, want := range map[string]int{`["reader"]`: 0, `["read"]`: 403, `[1]`: 403} {
		n.namespaces["ns"] = map[string]string{"allowed": allowed}
		b.NamespaceChanged("ns")
		if got := status(); got != want {
			t.Errorf("%s: %d, want %d", allowed, got, want)
		}
		if held := n.holds["a"] != ""; held != (want == 0) {
			t.Errorf("%s: held %v", allowed, held)
		}
	}
}

func TestSessionWithoutAPIServer(t *testing.T) {
	n, b := newNode(nil)
	n.podErr = pods.ErrUnavailable
	if got := b.Caller(ip, time.Now()).Session(); got != ip.String() {
		t.Errorf("without a record: %q", got)
	}
}

func restricted(r *roles.Rules) {
	r.Restriction = &roles.Restriction{Key: "allowed", Format: roles.Glob}
}

// TestRequestWaitsForNamespace has a pod that is the first of its namespace on this node.
func TestRequestWaitsForNamespace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, b := newNode(restricted)
		n.pod = pod("a", "reader")
		n.namespaces["ns"] = map[string]string{"allowed": `["reader"]`}
		n.notShown = make(chan struct{})
		start := time.Now()
		b.PodChanged(n.pod)
		if len(n.holds) > 0 || time.Since(start) > 0 || len(n.warnings) > 0 {
			t.Errorf("holds %v, warnings %v after %v", n.holds, n.warnings, time.Since(start))
		}
		if _, _, err := b.Caller(ip, time.Now()).Role(t.Context()); err == nil || time.Since(start) != namespaceTimeout {
			t.Errorf("%v after %v; want an error after a while", err, time.Since(start))
		}
		time.AfterFunc(time.Second, func() { close(n.notShown) })
		if name, _, err := b.Caller(ip, time.Now()).Role(t.Context()); err != nil || name != "reader" {
			t.Errorf("%q, %v", name, err)
		}
		b.NamespaceChanged("ns")
		if n.holds["a"] != "reader" {
			t.Errorf("holds %v", n.holds)
		}
	})
}

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

// TestIdentityChangesWithRecord covers what the proxy closes connections by.
func TestIdentityChangesWithRecord(t *testing.T) {
	n, b := newNode(nil)
	dir := attachment.In(t.TempDir())
	n.records = attachment.NewIndex(dir)
	put := func(container string, p attachment.Pod) {
		t.Helper()
		if err := dir.Put(testrecord.New(container, p, ip)); err != nil {
			t.Fatal(err)
		}
	}
	var seen []string
	changed := func(what string, want bool) {
		t.Helper()
		holder := b.Identity(ip)
		if len(seen) > 0 && (seen[len(seen)-1] != holder) != want {
			t.Errorf("%s: the holder was %q and is %q", what, seen[len(seen)-1], holder)
		}
		if !want {
			return
		}
		for _, earlier := range seen {
			if holder == earlier {
				t.Errorf("%s: the holder is %q, as an earlier one", what, holder)
			}
		}
		seen = append(seen, holder)
	}
	changed("no record", true)
	put("c1", attachment.Pod{Namespace: "ns", Name: "pod", UID: "a"})
	changed("a pod", true)
	if b.Identity(ip) != "a" || b.Identity(netip.MustParseAddr("10.0.0.2")) != "" {
		t.Errorf("%q holds the address, %q another one", b.Identity(ip), b.Identity(netip.MustParseAddr("10.0.0.2")))
	}
	put("c2", attachment.Pod{Namespace: "ns", Name: "pod", UID: "a"})
	changed("the same pod in a new sandbox", false)
	put("c3", attachment.Pod{Namespace: "ns", Name: "pod", UID: "b"})
	changed("a pod of the same name", true)
	put("c4", attachment.Pod{Namespace: "ns", Name: "pod"})
	changed("a pod without a UID", true)
	put("c5", attachment.Pod{Namespace: "ns", Name: "pod"})
	changed("another one of its name", true)
	if err := dir.Delete("c5", "eth0"); err != nil {
		t.Fatal(err)
	}
	if holder := b.Identity(ip); holder != "" {
		t.Errorf("%q holds an address without a record", holder)
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
