package broker

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/credentials"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/pods"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
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

func (n *node) Hold(uid string, a roles.Assumption) { n.holds[uid] = a.RoleName() }

func (n *node) Release(uid string) { delete(n.holds, uid) }

func (n *node) Forget(uid string) { delete(n.holds, uid) }

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

func (n *node) Wait(ctx context.Context, _ string) {
	if n.notShown == nil {
		return
	}
	select {
	case <-n.notShown:
	case <-ctx.Done():
	}
}

func (n *node) Annotations(namespace string) (map[string]string, error) {
	if n.notShown != nil {
		select {
		case <-n.notShown:
		default:
			return nil, pods.ErrNotSynced
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
