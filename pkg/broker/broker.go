// Package broker joins pods, roles and credentials: from a source address to the credentials that its pod may have, and
// from the pods of this node to the credentials that are worth having ready.
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

// Pods finds the pod behind an address, as pods.Resolver does.
type Pods interface {
	Source(ip netip.Addr) pods.Source
	Resolve(ctx context.Context, s pods.Source) (*pods.Pod, error)
}

// Credentials keeps the credentials of assumptions.
type Credentials interface {
	Get(ctx context.Context, pod string, a roles.Assumption) (*credentials.Document, error)
	Hold(holder string, a roles.Assumption)
	Release(holder string)
	Forget(holder string)
}

// Namespaces tells the annotations of a namespace, as pods.Namespaces does.
type Namespaces interface {
	Annotations(ctx context.Context, namespace string) (map[string]string, error)
}

// Events tells the owners of pods what is wrong. Its methods must not block.
type Events interface {
	// Refused is that a pod gets no credentials. Saying the same again and again is its business to bound.
	Refused(pod *pods.Pod, reason, message string)
}

// Broker answers for the pods of this node.
type Broker struct {
	pods        Pods
	namespaces  Namespaces
	rules       *roles.Rules
	credentials Credentials
	tell        Events
	log         *slog.Logger

	events sync.Mutex                  // one change at a time: what is held follows from the last one
	logged map[types.UID]*rate.Limiter // the lines about each pod; events guards it

	mu        sync.RWMutex
	decisions map[types.UID]decision
}

// decision is what a pod may assume. It stands for exactly the pod that it was made for: a changed pod is another *pods.Pod.
type decision struct {
	pod        *pods.Pod
	assumption roles.Assumption
	err        error
}

// Config is what a Broker joins.
type Config struct {
	Pods        Pods
	Rules       *roles.Rules
	Credentials Credentials
	// Namespaces may be nil where the rules restrict nothing.
	Namespaces Namespaces
	// Events may be nil.
	Events Events
	Log    *slog.Logger
}

// New is a broker that knows no pod yet.
func New(c Config) *Broker {
	if c.Events == nil {
		c.Events = untold{}
	}
	return &Broker{pods: c.Pods, namespaces: c.Namespaces, rules: c.Rules, credentials: c.Credentials, tell: c.Events, log: c.Log,
		logged: make(map[types.UID]*rate.Limiter), decisions: make(map[types.UID]decision)}
}

type untold struct{}

func (untold) Refused(*pods.Pod, string, string) {}

// Caller is whoever sends one request from an address. All that is answered to the request is answered to one holder of the
// address, as the records had it when the request came.
type Caller struct {
	broker *Broker
	source pods.Source
	came   time.Time
}

// Caller is the caller behind the address now.
func (b *Broker) Caller(ip netip.Addr, now time.Time) *Caller {
	return &Caller{broker: b, source: b.pods.Source(ip), came: now}
}

// Holder identifies the holder of the address now, as pods.Source has it.
func (b *Broker) Holder(ip netip.Addr) string { return b.pods.Source(ip).Identity() }

// Name is the caller's pod by the records, or its address.
func (c *Caller) Name() string { return c.source.String() }

// Session is what the session tokens of the caller are bound to: its pod, or its address where the pod is not known. It
// asks nobody outside this node, because a token must be had at once whatever else is down.
func (c *Caller) Session() string {
	if uid := c.source.Holder(); uid != "" {
		return uid
	}
	return c.source.IP.String()
}

// Role is the role of the caller's pod: its bare name and its ARN. It does not wait for STS. The error is a *Refusal.
func (c *Caller) Role(ctx context.Context) (name, arn string, err error) {
	a, _, err := c.broker.assumption(ctx, c.source)
	if err != nil {
		return "", "", err
	}
	return a.RoleName(), a.RoleARN, nil
}

// Credentials is the document of the caller's pod, if role is the name of its role. The error is a *Refusal.
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
	// Whoever waited for the pod or for STS may have lost the address meanwhile, and the answer would go to its next holder.
	if time.Since(c.came) > handover && !c.stillOf(pod) {
		return nil, &Refusal{Status: http.StatusNotFound, Pod: pod.String(), Err: errHandedOver}
	}
	return doc, nil
}

// stillOf tells whether the address is the pod's, as far as this node knows, and has had no other holder since the request came.
func (c *Caller) stillOf(pod *pods.Pod) bool {
	now := c.broker.pods.Source(c.source.IP)
	holder := types.UID(now.Holder())
	return c.source.Same(now) && (holder == "" || holder == pod.UID || holder == pod.Mirror)
}

// handover is less than any runtime needs to take an address from one pod and give it to another: both are several
// processes. A shorter answer needs no second look.
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

// decide is the decision for the pod as it is now, from memory where that very pod was decided before.
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

// namespacePatience is how long a request waits for the namespace of a pod that has only just come.
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

// atOnce is the context of what may not wait.
func atOnce() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}

// PodChanged implements pods.Watcher: the credentials of a pod that is bound to this node are fetched before it asks, and
// renewed until it has finished.
func (b *Broker) PodChanged(pod *pods.Pod) {
	b.events.Lock()
	defer b.events.Unlock()
	b.changed(pod)
}

func (b *Broker) changed(pod *pods.Pod) {
	if pod.Finished || pod.HostNetwork && !b.rules.Annotated(pod.Annotations) {
		b.gone(pod)
		return
	}
	d := b.decideAnew(atOnce(), pod) // once its namespace is known it is decided again
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

// mayLog takes one of the pod's log lines, or returns false. The bound stays until the pod is deleted: the author of a pod changes its
// annotations as often as the API server lets them.
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

// tellOwner is for every time that a mistake is met, which Events bounds: an Event lasts for an hour, and may not have been written.
func (b *Broker) tellOwner(pod *pods.Pod, err error) {
	if reason := eventReason(err); reason != "" {
		b.tell.Refused(pod, reason, err.Error())
	}
}

// tellAgain is tellOwner for a request, which does not wait: it is said by another where pods change in this moment, and nothing is said
// of a pod that is gone meanwhile, which nobody would forget any more.
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

// NamespaceChanged decides anew for the pods of a namespace whose annotations changed.
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

// Failed is told of a call to STS that failed, for each pod that holds what it was for.
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

// Assignment is one line of Assignments.
type Assignment struct {
	Pod  string       `json:"pod"`
	IPs  []netip.Addr `json:"ips"`
	Role string       `json:"role,omitempty"`
	// Reason is why there is no role.
	Reason string `json:"reason,omitempty"`
	// Assumption is what STS is asked for; zero where there is no role.
	Assumption roles.Assumption `json:"-"`
	// UID and Mirror are those of pods.Pod; a record of the pod has one of them.
	UID    types.UID `json:"-"`
	Mirror types.UID `json:"-"`
}

// Assignments is which pod may assume which role, in no order, for people to read.
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
