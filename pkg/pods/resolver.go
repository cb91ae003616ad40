package pods

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/time/rate"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/ratelimit"
)

// The reasons why Resolve returns no pod. ErrUnavailable and ErrRateLimited are temporary.
var (
	// ErrUnknown: the proxy knows no pod of this node that has the address.
	ErrUnknown = errors.New("no pod of this node has the address")
	// ErrNotAPod: the record of the address names no pod.
	ErrNotAPod = errors.New("the address is held by a container that is no pod")
	// ErrAmbiguous: more than one running pod of this node has the address.
	ErrAmbiguous = errors.New("more than one pod of this node has the address")
	// ErrFinished: the pod that holds the address has succeeded or failed.
	ErrFinished = errors.New("the pod has finished")
	// ErrUnavailable: the Kubernetes API did not answer.
	ErrUnavailable = errors.New("the Kubernetes API does not answer")
	// ErrRateLimited: the proxy's own limit prevents a request to the API server.
	ErrRateLimited = fmt.Errorf("the proxy asks the API server at most %d times a second for a pod, %d times for the node", podGets, nodeGets)
)

// podGets is how often a second the API server is asked for the pod behind one pod's addresses.
// nodeGets limits the requests of all pods a second. With ResolveDuplicates, to ask once can take
// several requests.
const podGets, nodeGets = 2, 20

// Resolver finds the pod behind a source address.
type Resolver struct {
	c ResolverConfig
	// podLimit limits how often the API server is asked for the pod behind a pod's addresses, and
	// nodeLimit the requests of all of them. podLimit leaves requests to the other pods.
	podLimit  *ratelimit.Keyed[string]
	nodeLimit *rate.Limiter
}

// ResolverConfig holds the dependencies and settings of a Resolver.
type ResolverConfig struct {
	Records *attachment.Index
	Watch   *Watch
	// MaxElapsed is how long Resolve waits for a pod that is unknown or ambiguous; zero for no wait.
	// MaxInterval bounds the time between two requests to the API server.
	MaxElapsed, MaxInterval time.Duration
	// ResolveDuplicates requests the current state of the pods from the API server if, according to
	// the watch, more than one has the address.
	ResolveDuplicates bool
}

// NewResolver returns a Resolver over records and watch.
func NewResolver(c ResolverConfig) *Resolver {
	return &Resolver{c: c, podLimit: ratelimit.NewKeyed[string](podGets, 4), nodeLimit: rate.NewLimiter(nodeGets, 20)}
}

// Resolve returns the pod that holds the source's address. If the pod is unknown or ambiguous, it
// waits up to MaxElapsed for a change. The error wraps one of the errors above.
func (r *Resolver) Resolve(ctx context.Context, s Source) (*Pod, error) {
	pod, err := r.lookup(s)
	if err == nil || isFinal(err) || r.c.MaxElapsed <= 0 {
		return pod, err
	}
	ctx, cancel := context.WithTimeout(ctx, r.c.MaxElapsed)
	defer cancel()
	select {
	case <-r.c.Watch.Synced():
		return r.await(ctx, s.IP)
	case <-ctx.Done():
		return nil, err
	}
}

// isFinal reports whether waiting cannot change the result.
func isFinal(err error) bool { return errors.Is(err, ErrNotAPod) || errors.Is(err, ErrFinished) }

// lookup decides from the records and the watch.
func (r *Resolver) lookup(s Source) (*Pod, error) {
	var recorded *Pod
	switch {
	case !isClosed(r.c.Watch.Synced()):
		// In an incomplete list, the only pod with the address may have a duplicate that is missing.
		return nil, fmt.Errorf("%w: the pods of this node are not known yet", ErrUnavailable)
	case s.err != nil:
		// The unreadable record may name another pod than the one that reports the address.
		return nil, fmt.Errorf("%w: its record: %w", ErrUnknown, s.err)
	case s.record != nil && s.record.Pod == (attachment.Pod{}):
		return nil, ErrNotAPod
	case s.record != nil:
		recorded = r.c.Watch.recorded(s.record.Pod)
	}
	return r.decide(s, recorded, r.c.Watch.reporting(s.IP))
}

// await looks the address up after every change, until ctx ends. It also sends requests to the API
// server at growing intervals, because the request of a pod's first container may arrive before the
// watch reports the pod.
func (r *Resolver) await(ctx context.Context, ip netip.Addr) (*Pod, error) {
	var apiErr error // of the last askAPI that the proxy's own limit did not prevent
	next := time.Now()
	for interval := 50 * time.Millisecond; ; {
		changed := r.c.Watch.change()
		source := r.Source(ip)
		pod, err := r.lookup(source)
		if err == nil || isFinal(err) {
			return pod, err
		}
		if !time.Now().Before(next) {
			pod, done, err := r.askAPI(ctx, source, err)
			if done {
				return pod, err
			}
			if apiErr == nil || !errors.Is(err, ErrRateLimited) {
				apiErr = err
			}
			interval = min(interval, max(r.c.MaxInterval, time.Millisecond))
			next = time.Now().Add(interval)
			interval *= 2
		}
		select {
		case <-ctx.Done():
			return nil, apiErr
		case <-changed:
		case <-time.After(time.Until(next)):
		}
	}
}

// askAPI decides as lookup does, but from the current pods of the API server in place of the
// watch's. If it has no pod to request, or ResolveDuplicates is needed and false, it returns
// lookupErr, the error of lookup. done is true if waiting cannot change the result.
func (r *Resolver) askAPI(ctx context.Context, s Source, lookupErr error) (pod *Pod, done bool, err error) {
	isAmbiguous := errors.Is(lookupErr, ErrAmbiguous)
	if isAmbiguous && !r.c.ResolveDuplicates || !isAmbiguous && s.record == nil {
		return nil, false, lookupErr
	}
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	reporting := r.c.Watch.reporting(s.IP)
	var names []types.NamespacedName // of the pods to request
	if s.record != nil {
		names = append(names, types.NamespacedName{Namespace: s.record.Pod.Namespace, Name: s.record.Pod.Name})
	}
	if isAmbiguous {
		for _, p := range reporting {
			if name := nameOf(p); !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
	}
	// All tokens are taken at once: attempts that cannot get every pod would use up those of later ones.
	now := time.Now()
	if !r.podLimit.Allow(cmp.Or(s.Holder(), s.IP.String()), now) || !r.nodeLimit.AllowN(now, len(names)) {
		return nil, false, ErrRateLimited
	}
	current := make(map[types.NamespacedName]*Pod)
	for _, name := range names {
		if current[name], err = r.get(ctx, name); err != nil {
			return nil, false, err
		}
	}
	var recorded *Pod
	if s.record != nil {
		if recorded = current[names[0]]; recorded == nil {
			return nil, true, fmt.Errorf("%w: the API has no pod %s", ErrUnknown, names[0])
		}
	}
	if isAmbiguous {
		for i, p := range reporting {
			reporting[i] = current[nameOf(p)]
		}
		reporting = slices.DeleteFunc(reporting, func(p *Pod) bool { return p == nil || p.Finished || !slices.Contains(p.IPs, s.IP) })
	}
	pod, err = r.decide(s, recorded, reporting)
	return pod, err == nil || !isAmbiguous && !errors.Is(err, ErrAmbiguous), err
}

func nameOf(p *Pod) types.NamespacedName {
	return types.NamespacedName{Namespace: p.Namespace, Name: p.Name}
}

// get returns a pod from the API server, or nil if the API server has no pod of the name.
func (r *Resolver) get(ctx context.Context, name types.NamespacedName) (*Pod, error) {
	pod, err := r.c.Watch.c.API.GetPod(ctx, name.Namespace, name.Name)
	switch {
	case apierrors.IsNotFound(err):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return fromAPI(pod, r.c.Watch.c.Keep), nil
}

// decide returns the pod that holds the address. If there is a record, this is the record's pod if
// the API confirms it. Otherwise it is the only pod that reports the address. recorded is the
// record's pod in the API, or nil. reporting are the unfinished pods that report the address.
func (r *Resolver) decide(s Source, recorded *Pod, reporting []*Pod) (*Pod, error) {
	switch {
	case s.record != nil && recorded == nil:
		return nil, fmt.Errorf("%w: the API has not shown %s/%s", ErrUnknown, s.record.Pod.Namespace, s.record.Pod.Name)
	case s.record != nil:
		return r.confirm(s, recorded, reporting)
	case len(reporting) == 0:
		return nil, ErrUnknown
	case len(reporting) > 1:
		return nil, fmt.Errorf("%w: %s and %s", ErrAmbiguous, reporting[0], reporting[1])
	case reporting[0].Deleting: // another pod may hold the address already
		return nil, fmt.Errorf("%w: %s reports it, but is being deleted and has no record", ErrUnknown, reporting[0])
	}
	return reporting[0], nil
}

// confirm returns the record's pod if the API's pod has the UID of the record, is on this node and
// has not finished, and no other running pod reports the address. A record whose DEL never came is
// stale, and another pod may hold the address.
func (r *Resolver) confirm(s Source, pod *Pod, reporting []*Pod) (*Pod, error) {
	recorded := s.record.Pod
	switch uid := types.UID(recorded.UID); {
	case pod.Namespace != recorded.Namespace || pod.Name != recorded.Name:
		return nil, fmt.Errorf("%w: the record names %s/%s, the API calls it %s", ErrUnknown, recorded.Namespace, recorded.Name, pod)
	case uid == "" && !slices.Contains(pod.IPs, s.IP):
		// Old runtimes pass no UID. Then only status.podIPs distinguishes the pod from a later one of the
		// same name.
		return nil, fmt.Errorf("%w: the record of %s has no UID and the pod does not report the address", ErrUnknown, pod)
	case uid != "" && uid != pod.UID && uid != pod.Mirror:
		return nil, fmt.Errorf("%w: the record is of another %s, with another UID", ErrUnknown, pod)
	case pod.HostNetwork:
		return nil, fmt.Errorf("%w: %s is on the host's network", ErrUnknown, pod)
	case pod.Node != r.c.Watch.c.Node:
		return nil, fmt.Errorf("%w: %s is bound to node %q", ErrUnknown, pod, pod.Node)
	case pod.Finished:
		return nil, fmt.Errorf("%s: %w", pod, ErrFinished)
	}
	for _, other := range reporting {
		if other.UID != pod.UID {
			return nil, fmt.Errorf("%w: the record says %s, %s reports it", ErrAmbiguous, pod, other)
		}
	}
	return pod, nil
}
