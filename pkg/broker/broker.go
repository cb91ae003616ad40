// Package broker joins pods, roles and credentials: it finds the credentials that the pod behind a source address may have, and
// keeps the credentials of this node's pods ready.
package broker

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"
	"k8s.io/apimachinery/pkg/types"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/credentials"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/pods"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
)

// Pods finds the pod behind an address. pods.Resolver implements it.
type Pods interface {
	Source(ip netip.Addr) pods.Source
	Resolve(ctx context.Context, s pods.Source) (*pods.Pod, error)
}

// Credentials caches the credentials of assumptions. credentials.Cache implements it.
type Credentials interface {
	Get(ctx context.Context, pod string, a roles.Assumption) (*credentials.Document, error)
	Hold(holder string, a roles.Assumption)
	Release(holder string)
	Forget(holder string)
}

// Namespaces returns the annotations of a namespace. pods.Namespaces implements it.
type Namespaces interface {
	Annotations(ctx context.Context, namespace string) (map[string]string, error)
}

// Events reports to the owners of pods. Its methods must not block.
type Events interface {
	// Refused reports that a pod gets no credentials. The implementation bounds repetitions.
	Refused(pod *pods.Pod, reason, message string)
}

// Broker decides which credentials the pods of this node get.
type Broker struct {
	pods        Pods
	namespaces  Namespaces
	rules       *roles.Rules
	credentials Credentials
	tell        Events
	log         *slog.Logger

	events sync.Mutex                  // one change at a time, so that the last one decides what is held
	logged map[types.UID]*rate.Limiter // the lines about each pod; events guards it

	mu        sync.RWMutex
	decisions map[types.UID]decision
}

// decision is what a pod may assume. It is valid for one *pods.Pod: a changed pod is another one.
type decision struct {
	pod        *pods.Pod
	assumption roles.Assumption
	err        error
}

// Config is a Broker's dependencies.
type Config struct {
	Pods        Pods
	Rules       *roles.Rules
	Credentials Credentials
	// Namespaces may be nil if the rules have no restriction.
	Namespaces Namespaces
	// Events may be nil.
	Events Events
	Log    *slog.Logger
}

// New returns a broker without pods.
func New(c Config) *Broker {
	if c.Events == nil {
		c.Events = untold{}
	}
	return &Broker{pods: c.Pods, namespaces: c.Namespaces, rules: c.Rules, credentials: c.Credentials, tell: c.Events, log: c.Log,
		logged: make(map[types.UID]*rate.Limiter), decisions: make(map[types.UID]decision)}
}

type untold struct{}

func (untold) Refused(*pods.Pod, string, string) {}

// Caller is the client of one request. It is bound to the pod that held the source address when the request arrived.
type Caller struct {
	broker *Broker
	source pods.Source
	came   time.Time
}

// Caller returns the caller behind the address now.
func (b *Broker) Caller(ip netip.Addr, now time.Time) *Caller {
	return &Caller{broker: b, source: b.pods.Source(ip), came: now}
}

// Holder identifies the present holder of the address, as pods.Source.Identity does.
func (b *Broker) Holder(ip netip.Addr) string { return b.pods.Source(ip).Identity() }

// Name returns the caller's pod by the records, or its address.
func (c *Caller) Name() string { return c.source.String() }

// Session returns what the caller's session tokens are bound to: its pod's UID, or its address if the pod is not known. It
// needs no API server, so a token is issued at once during an outage, too.
func (c *Caller) Session() string {
	if uid := c.source.Holder(); uid != "" {
		return uid
	}
	return c.source.IP.String()
}

// Role returns the role of the caller's pod: its bare name and its ARN. It does not wait for STS. The error is a *Refusal.
func (c *Caller) Role(ctx context.Context) (name, arn string, err error) {
	a, _, err := c.broker.assumption(ctx, c.source)
	if err != nil {
		return "", "", err
	}
	return a.RoleName(), a.RoleARN, nil
}

// Credentials returns the document of the caller's pod if role is the name of its role. The error is a *Refusal.
func (c *Caller) Credentials(ctx context.Context, role string) (*credentials.Document, error) {
	a, pod, err := c.broker.assumption(ctx, c.source)
	if err != nil {
		return nil, err
	}
	if role != a.RoleName() {
		return nil, &Refusal{Status: http.StatusNotFound, Pod: pod.String(), Err: errOtherRole}
	}
	doc, err := c.broker.credentials.Get(ctx, string(pod.UID), a)
	if err != nil {
		return nil, refuseCredentials(pod, a, err)
	}
	// During a longer wait the pod may have lost the address, and the answer would go to the next holder.
	if time.Since(c.came) > handover && !c.stillOf(pod) {
		return nil, &Refusal{Status: http.StatusNotFound, Pod: pod.String(), Err: errHandedOver}
	}
	return doc, nil
}

// stillOf tells whether the address is still the pod's and has had no other holder since the request arrived.
func (c *Caller) stillOf(pod *pods.Pod) bool {
	now := c.broker.pods.Source(c.source.IP)
	holder := types.UID(now.Holder())
	return c.source.Same(now) && (holder == "" || holder == pod.UID || holder == pod.Mirror)
}

// handover is less than any runtime needs to move an address to another pod, which takes several processes. An answer within
// this time needs no second check.
const handover = 5 * time.Millisecond

func (b *Broker) assumption(ctx context.Context, s pods.Source) (roles.Assumption, *pods.Pod, error) {
	pod, err := b.pods.Resolve(ctx, s)
	if err != nil {
		return roles.Assumption{}, nil, refusePod(s.IP, err)
	}
	d := b.decide(ctx, pod)
	if d.err != nil {
		b.tellAgain(pod, d.err)
		return roles.Assumption{}, nil, refuseRole(pod, d.err)
	}
	return d.assumption, pod, nil
}

// decide returns the decision for the pod, the stored one if the pod has not changed.
func (b *Broker) decide(ctx context.Context, pod *pods.Pod) decision {
	b.mu.RLock()
	d, ok := b.decisions[pod.UID]
	b.mu.RUnlock()
	if ok && d.pod == pod && !errors.Is(d.err, pods.ErrNotShown) {
		return d
	}
	ctx, cancel := context.WithTimeout(ctx, namespacePatience)
	defer cancel()
	return b.decideAnew(ctx, pod)
}

// namespacePatience is how long a request waits until the API server has sent the namespace of a new pod.
const namespacePatience = 2 * time.Second

func (b *Broker) decideAnew(ctx context.Context, pod *pods.Pod) decision {
	d := decision{pod: pod}
	if pod.HostNetwork {
		d.err = errHostNetwork
		return d
	}
	d.assumption, d.err = b.rules.Assumption(roles.Subject{
		Namespace: pod.Namespace, Name: pod.Name, UID: string(pod.UID), ServiceAccount: pod.ServiceAccount, Annotations: pod.Annotations,
		NamespaceAnnotations: func() (map[string]string, error) { return b.namespaces.Annotations(ctx, pod.Namespace) },
	})
	return d
}

// atOnce returns an already cancelled context: Namespaces returns what it knows, or ErrNotShown.
func atOnce() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}

// PodChanged implements pods.Watcher: the credentials of a pod that is bound to this node are prefetched, and renewed until
// the pod has finished.
func (b *Broker) PodChanged(pod *pods.Pod) {
	b.events.Lock()
	defer b.events.Unlock()
	b.changed(pod)
}

func (b *Broker) changed(pod *pods.Pod) {
	if pod.Finished || pod.HostNetwork && !b.rules.HasRoleAnnotation(pod.Annotations) {
		b.gone(pod)
		return
	}
	d := b.decideAnew(atOnce(), pod) // NamespaceChanged decides again
	b.mu.Lock()
	old, known := b.decisions[pod.UID]
	b.decisions[pod.UID] = d
	b.mu.Unlock()
	if d.err != nil {
		b.credentials.Release(string(pod.UID))
		if changed := !known || old.err == nil || old.err.Error() != d.err.Error(); changed && !errors.Is(d.err, roles.ErrNoRole) && !errors.Is(d.err, pods.ErrNotShown) && b.mayLog(pod) {
			b.log.Warn("pod gets no role", "pod", pod.String(), "reason", d.err)
		}
		b.tellOwner(pod, d.err)
		return
	}
	b.credentials.Hold(string(pod.UID), d.assumption)
}

// mayLog takes one of the pod's log lines, or returns false. Only the pod's deletion resets the bound: its author can change its
// annotations at any rate.
func (b *Broker) mayLog(pod *pods.Pod) bool {
	limit := b.logged[pod.UID]
	if limit == nil {
		limit = rate.NewLimiter(rate.Every(logEvery), logBurst)
		b.logged[pod.UID] = limit
	}
	return limit.Allow()
}

// logBurst is how many lines about one pod without a role are logged at once, and logEvery how often there is one more.
const logBurst, logEvery = 5, 5 * time.Minute

// tellOwner is called each time an error is seen; Events deduplicates. An Event lasts for an hour, and its write may have failed.
func (b *Broker) tellOwner(pod *pods.Pod, err error) {
	if reason := eventReason(err); reason != "" {
		b.tell.Refused(pod, reason, err.Error())
	}
}

// tellAgain is tellOwner for a request, which must not wait: while pods change, it leaves the Event to a later request. It reports nothing
// about a pod that is gone, because Events would never forget it.
func (b *Broker) tellAgain(pod *pods.Pod, err error) {
	if !b.events.TryLock() {
		return
	}
	defer b.events.Unlock()
	b.mu.RLock()
	_, known := b.decisions[pod.UID]
	b.mu.RUnlock()
	if known {
		b.tellOwner(pod, err)
	}
}

// PodGone implements pods.Watcher.
func (b *Broker) PodGone(pod *pods.Pod) {
	b.events.Lock()
	defer b.events.Unlock()
	b.gone(pod)
	delete(b.logged, pod.UID)
}

func (b *Broker) gone(pod *pods.Pod) {
	b.mu.Lock()
	delete(b.decisions, pod.UID)
	b.mu.Unlock()
	b.credentials.Forget(string(pod.UID))
}

// NamespaceChanged decides again for the pods of a namespace whose annotations changed.
func (b *Broker) NamespaceChanged(namespace string) {
	b.events.Lock()
	defer b.events.Unlock()
	b.mu.RLock()
	var changed []*pods.Pod
	for _, d := range b.decisions {
		if d.pod.Namespace == namespace {
			changed = append(changed, d.pod)
		}
	}
	b.mu.RUnlock()
	for _, pod := range changed {
		b.changed(pod)
	}
}

// Failed reports a failed call to STS to the owner of the pod that holds the assumption.
func (b *Broker) Failed(holder string, a roles.Assumption, err *credentials.Error) {
	b.events.Lock() // as tellAgain has it
	defer b.events.Unlock()
	b.mu.RLock()
	d, ok := b.decisions[types.UID(holder)]
	b.mu.RUnlock()
	if reason, message := failure(a, err); ok && d.assumption == a && reason != "" {
		b.tell.Refused(d.pod, reason, message)
	}
}

// Assignment is a pod and the role that it may assume.
type Assignment struct {
	Pod  string       `json:"pod"`
	IPs  []netip.Addr `json:"ips"`
	Role string       `json:"role,omitempty"`
	// Reason is why there is no role.
	Reason string `json:"reason,omitempty"`
	// Assumption is what goes into AssumeRole; zero if there is no role.
	Assumption roles.Assumption `json:"-"`
	// UID and Mirror are those of pods.Pod; a record of the pod has one of them.
	UID    types.UID `json:"-"`
	Mirror types.UID `json:"-"`
}

// Assignments returns which pod may assume which role, in no order.
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
