package broker

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

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
		"API asked often":    {func(n *node) { n.podErr = pods.ErrRateLimited }, "reader", 500},
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
