// Package broker decides which credentials a pod may have, and keeps those of this node's pods
// cached.
package broker

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/credentials"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/imds"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/pods"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
)

// Pods finds the pod of an address. pods.Resolver implements it.
type Pods interface {
	Source(ip netip.Addr) pods.Source
	Resolve(ctx context.Context, s pods.Source) (*pods.Pod, error)
}

// Credentials caches credentials. credentials.Cache implements it.
type Credentials interface {
	Get(ctx context.Context, pod string, a roles.Assumption) (*credentials.Document, error)
	Hold(holder string, a roles.Assumption)
	Release(holder string)
	Forget(holder string)
}

// Namespaces returns the cached annotations of a namespace, or pods.ErrNotSynced. Wait waits for
// them until ctx ends. pods.Namespaces implements it.
type Namespaces interface {
	Annotations(namespace string) (map[string]string, error)
	Wait(ctx context.Context, namespace string)
}

// Recorder records Kubernetes Events about pods without credentials. It limits their rate and does
// not block. events.Recorder implements it.
type Recorder interface {
	Warn(pod *pods.Pod, reason, message string)
}

// Config is the dependencies of a Broker.
type Config struct {
	Pods        Pods
	Rules       *roles.Rules
	Credentials Credentials
	// Namespaces may be nil if the rules have no restriction.
	Namespaces Namespaces
	Recorder   Recorder
}

// Broker decides which credentials the pods of this node get.
type Broker struct {
	Config

	mu        sync.RWMutex // held during a change of a pod, so that the last one determines what is held
	decisions map[types.UID]decision
}

// decision is the role of a pod, or why it has none. It is valid for this *pods.Pod only: the watch
// makes a new one for each change.
type decision struct {
	pod        *pods.Pod
	assumption roles.Assumption
	err        error
}

// namespaceTimeout is how long a request waits for the API server to send a new namespace.
const namespaceTimeout = 2 * time.Second

// New returns a broker without pods.
func New(c Config) *Broker { return &Broker{Config: c, decisions: make(map[types.UID]decision)} }

// assumption returns the pod at the source and its assumption. The error is an *imds.Refusal.
func (b *Broker) assumption(ctx context.Context, s pods.Source) (roles.Assumption, *pods.Pod, error) {
	pod, err := b.Pods.Resolve(ctx, s)
	if err != nil {
		return roles.Assumption{}, nil, refuseAddress(s.IP, err)
	}
	b.mu.RLock()
	d := b.decisions[pod.UID]
	b.mu.RUnlock()
	if d.pod != pod {
		d = b.decide(pod)
	}
	if errors.Is(d.err, pods.ErrNotSynced) {
		ctx, cancel := context.WithTimeout(ctx, namespaceTimeout)
		defer cancel()
		b.Namespaces.Wait(ctx, pod.Namespace)
		d = b.decide(pod)
	}
	if d.err != nil {
		b.mu.RLock()
		defer b.mu.RUnlock()
		if _, known := b.decisions[pod.UID]; known {
			b.record(pod, d.err)
		}
		status, _ := classify(d.err)
		return roles.Assumption{}, nil, &imds.Refusal{Status: status, Pod: pod.String(), Err: d.err}
	}
	return d.assumption, pod, nil
}

func (b *Broker) decide(pod *pods.Pod) decision {
	d := decision{pod: pod}
	if pod.HostNetwork {
		d.err = errHostNetwork
		return d
	}
	d.assumption, d.err = b.Rules.Assumption(roles.Subject{
		Namespace: pod.Namespace, Name: pod.Name, UID: string(pod.UID), ServiceAccount: pod.ServiceAccount, Annotations: pod.Annotations,
		NamespaceAnnotations: func() (map[string]string, error) { return b.Namespaces.Annotations(pod.Namespace) },
	})
	return d
}

// PodChanged implements pods.Watcher. It holds the credentials of a pod until the pod has finished.
func (b *Broker) PodChanged(pod *pods.Pod) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.update(pod)
}

// PodGone implements pods.Watcher.
func (b *Broker) PodGone(pod *pods.Pod) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.remove(pod)
}

// NamespaceChanged decides again for the pods of a namespace whose annotations changed.
func (b *Broker) NamespaceChanged(namespace string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, d := range b.decisions {
		if d.pod.Namespace == namespace {
			b.update(d.pod)
		}
	}
}

// update decides again for the pod. The mutex is held.
func (b *Broker) update(pod *pods.Pod) {
	_, hasRole := pod.Annotations[b.Rules.RoleKey]
	if pod.Finished || pod.HostNetwork && !hasRole {
		b.remove(pod)
		return
	}
	d := b.decide(pod) // if it is pods.ErrNotSynced, NamespaceChanged decides again
	b.decisions[pod.UID] = d
	if d.err == nil {
		b.Credentials.Hold(string(pod.UID), d.assumption)
		return
	}
	b.Credentials.Release(string(pod.UID))
	b.record(pod, d.err)
}

func (b *Broker) remove(pod *pods.Pod) {
	delete(b.decisions, pod.UID)
	b.Credentials.Forget(string(pod.UID))
}

// record records an Event if the error is one that the pod's owner can correct. It is called for
// each occurrence, because Events expire after an hour and a write may fail. The recorder limits
// the rate. The mutex is held and the pod has a decision: the recorder would never forget a pod
// that is deleted.
func (b *Broker) record(pod *pods.Pod, err error) {
	if _, reason := classify(err); reason != "" {
		b.Recorder.Warn(pod, reason, err.Error())
	}
}

// AssumeRoleFailed records an Event for a failed call to STS on the pod that holds the assumption.
func (b *Broker) AssumeRoleFailed(holder string, a roles.Assumption, err *credentials.Error) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	if d, ok := b.decisions[types.UID(holder)]; ok && d.assumption == a {
		reason, message := stsEvent(a, err)
		b.Recorder.Warn(d.pod, reason, message)
	}
}

// Assignment is a pod and its role.
type Assignment struct {
	Pod  string       `json:"pod"`
	IPs  []netip.Addr `json:"ips"`
	Role string       `json:"role,omitempty"`
	// Reason is why there is no role.
	Reason string `json:"reason,omitempty"`
	// Assumption is the zero value if there is no role.
	Assumption roles.Assumption `json:"-"`
	// UID and Mirror are those of pods.Pod. The pod's attachment record has one of them.
	UID    types.UID `json:"-"`
	Mirror types.UID `json:"-"`
}

// Assignments returns the roles of all pods, in no order.
func (b *Broker) Assignments() []Assignment {
	b.mu.RLock()
	defer b.mu.RUnlock()
	all := make([]Assignment, 0, len(b.decisions))
	for _, d := range b.decisions {
		a := Assignment{Pod: d.pod.String(), IPs: d.pod.IPs, Role: d.assumption.RoleARN, Assumption: d.assumption,
			UID: d.pod.UID, Mirror: d.pod.Mirror}
		if d.err != nil {
			a.Reason = d.err.Error()
		}
		all = append(all, a)
	}
	return all
}
