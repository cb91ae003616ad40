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
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/ratelimit"
)

// The reasons why an address has no pod. ErrUnavailable and ErrAskedTooOften pass by themselves.
var (
	// ErrUnknown: no pod of this node is known to have the address.
	ErrUnknown = errors.New("no pod of this node has the address")
	// ErrNotAPod: the record of the address names no pod.
	ErrNotAPod = errors.New("the address is held by a container that is no pod")
	// ErrAmbiguous: another pod that runs on this node reports the address too.
	ErrAmbiguous = errors.New("more than one pod of this node has the address")
	// ErrFinished: the pod that holds the address has ended.
	ErrFinished = errors.New("the pod has finished")
	// ErrUnavailable: the Kubernetes API did not answer, so the pod is not known.
	ErrUnavailable = errors.New("the Kubernetes API does not answer")
	// ErrAskedTooOften: the proxy's own limit prevents a request to the API, so the pod is not known.
	ErrAskedTooOften = fmt.Errorf("the proxy asks the API server at most %d times a second for a pod, %d times for the node", podGets, nodeGets)
)

// podGets and nodeGets are how many pods a second the API server is asked for.
const podGets, nodeGets = 2, 20

// Resolver finds the pod behind a source address.
type Resolver struct {
	c ResolverConfig
	// These limit the requests to the API server: one gets a pod, the other lists all pods of the node.
	gets, lists *limiter
}

// ResolverConfig holds the dependencies and settings of a Resolver.
type ResolverConfig struct {
	Records *attachment.Index
	Watch   *Watch
	// API is asked where the watch has not seen a pod yet that a record names.
	API API
	// Node is this node's name.
	Node string
	// Keep reports whether to store the annotation of a key.
	Keep func(key string) bool
	// MaxElapsed is how long an address may take to become known; zero for no wait. MaxInterval bounds the time between
	// two looks.
	MaxElapsed, MaxInterval time.Duration
	// AskDuplicates asks the API server itself when more than one pod seems to have an address.
	AskDuplicates bool
}

// NewResolver returns a Resolver over records and watch.
func NewResolver(c ResolverConfig) *Resolver {
	return &Resolver{c: c, gets: newLimiter(nodeGets, 20, podGets, 4), lists: newLimiter(2, 4, 0.5, 2)}
}

// limiter limits the rate of an action for all pods together and for each pod, so that no pod uses up
// the part of the others.
type limiter struct {
	node *rate.Limiter
	pods *ratelimit.Keyed[string]
}

func newLimiter(node rate.Limit, nodeBurst int, pod rate.Limit, podBurst int) *limiter {
	return &limiter{node: rate.NewLimiter(node, nodeBurst), pods: ratelimit.NewKeyed[string](pod, podBurst)}
}

// allow takes a token for the pod of s. All addresses of a pod share its tokens.
func (l *limiter) allow(s Source) bool {
	now := time.Now()
	return l.pods.Allow(cmp.Or(s.Holder(), s.IP.String()), now) && l.node.AllowN(now, 1)
}

// Resolve returns the pod that holds the source's address. If the pod is unknown or ambiguous, it waits
// for a change, at most MaxElapsed. The error wraps one of this package's, or is that of ctx.
func (r *Resolver) Resolve(ctx context.Context, s Source) (*Pod, error) {
	pod, err := r.lookup(s)
	if err == nil || final(err) {
		return pod, err
	}
	return r.await(ctx, s.IP, err)
}

// final reports whether waiting cannot change the result.
func final(err error) bool { return errors.Is(err, ErrNotAPod) || errors.Is(err, ErrFinished) }

func (r *Resolver) lookup(s Source) (*Pod, error) {
	record := s.record
	if !r.c.Watch.ready() {
		// With half a list, a pod that seems to be the only one with the address may not be.
		return nil, fmt.Errorf("%w: the pods of this node are not known yet", ErrUnavailable)
	}
	if s.err != nil {
		// An unreadable record shows that the address has a holder, so the pods' status must not decide.
		return nil, fmt.Errorf("%w: its record: %w", ErrUnknown, s.err)
	}
	reporting := r.c.Watch.reporting(s.IP)
	if record == nil {
		return r.reported(reporting)
	}
	if record.Pod == (attachment.Pod{}) {
		return nil, ErrNotAPod
	}
	pod := r.c.Watch.recorded(record.Pod)
	if pod == nil {
		return nil, fmt.Errorf("%w: the API has not shown %s/%s", ErrUnknown, record.Pod.Namespace, record.Pod.Name)
	}
	return r.believe(record, pod, s.IP, reporting)
}

// reported returns the only pod that reports an address without a record. It refuses a pod that is being
// deleted, because another pod may hold its address already.
func (r *Resolver) reported(reporting []*Pod) (*Pod, error) {
	switch len(reporting) {
	case 0:
		return nil, ErrUnknown
	case 1:
		if pod := reporting[0]; pod.Deleting {
			return nil, fmt.Errorf("%w: %s reports it, but is being deleted and has no record", ErrUnknown, pod)
		}
		return reporting[0], nil
	}
	return nil, fmt.Errorf("%w: %s and %s", ErrAmbiguous, reporting[0], reporting[1])
}

// believe returns the pod of the record if the API confirms it: the UID is the same, the pod is on this
// node and has not finished, and no other running pod reports the address. If a DEL never came, the
// record is stale and another pod may hold the address.
func (r *Resolver) believe(record *attachment.Record, pod *Pod, ip netip.Addr, reporting []*Pod) (*Pod, error) {
	name := pod.String()
	switch recorded := types.UID(record.Pod.UID); {
	case pod.Namespace != record.Pod.Namespace || pod.Name != record.Pod.Name:
		return nil, fmt.Errorf("%w: the record names %s/%s, the API calls it %s", ErrUnknown, record.Pod.Namespace, record.Pod.Name, name)
	case recorded == "":
		// Old runtimes pass no UID. Then only status.podIPs distinguishes a later pod of the same name.
		if !slices.Contains(pod.IPs, ip) {
			return nil, fmt.Errorf("%w: the record of %s has no UID and the pod does not report the address", ErrUnknown, name)
		}
	case recorded != pod.UID && recorded != pod.Mirror:
		return nil, fmt.Errorf("%w: the record is of another %s, with another UID", ErrUnknown, name)
	}
	if pod.HostNetwork {
		return nil, fmt.Errorf("%w: %s is on the host's network", ErrUnknown, name)
	}
	if pod.Node != r.c.Node {
		return nil, fmt.Errorf("%w: %s is bound to node %q", ErrUnknown, name, pod.Node)
	}
	if pod.Finished {
		return nil, fmt.Errorf("%s: %w", name, ErrFinished)
	}
	for _, other := range reporting {
		if other.UID != pod.UID {
			return nil, fmt.Errorf("%w: the record says %s, %s reports it", ErrAmbiguous, name, other)
		}
	}
	return pod, nil
}

// await looks the address up after every change and at growing intervals. It also requests the pod of a
// record from the API, because a first container's request may arrive before the watch shows its pod.
func (r *Resolver) await(ctx context.Context, ip netip.Addr, err error) (*Pod, error) {
	if r.c.MaxElapsed <= 0 {
		return nil, err
	}
	wait, cancel := context.WithTimeout(ctx, r.c.MaxElapsed)
	defer cancel()
	ask := true
	var unanswered error // the API's failure to answer this request's question, which explains more than ErrAskedTooOften
	unready := r.c.Watch.Synced()
	if r.c.Watch.ready() {
		unready = nil
	}
	for interval := 25 * time.Millisecond; ; {
		changed := r.c.Watch.change()
		var pod *Pod
		source := r.Source(ip)
		if pod, err = r.lookup(source); err == nil || final(err) {
			return pod, err
		}
		if ask {
			var done bool
			if pod, done, err = r.ask(wait, source, err); done {
				return pod, err
			}
			switch {
			case errors.Is(err, ErrUnavailable):
				unanswered = err
			case errors.Is(err, ErrAskedTooOften) && unanswered != nil:
				err = unanswered
			}
			interval = min(2*interval, max(r.c.MaxInterval, time.Millisecond))
		}
		timer := time.NewTimer(interval)
		select {
		case <-wait.Done():
			timer.Stop()
			return nil, err
		case <-changed:
			ask = false
		case <-unready:
			ask, unready = false, nil
		case <-timer.C:
			ask = true
		}
		timer.Stop()
	}
}

// ask requests from the API server a pod that the watch has not shown. done is true if the result is
// final, because the answer is newer than the watch. why is the error of the lookup, and is returned if a
// request cannot help.
func (r *Resolver) ask(ctx context.Context, s Source, why error) (pod *Pod, done bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	if errors.Is(why, ErrAmbiguous) {
		pod, err := r.askDuplicates(ctx, s, why)
		return pod, err == nil, err
	}
	record := s.record
	switch {
	case record == nil:
		return nil, false, why
	case !r.gets.allow(s): // whether the API has the pod is not known then
		return nil, false, ErrAskedTooOften
	}
	found, err := r.c.API.GetPod(ctx, record.Pod.Namespace, record.Pod.Name)
	switch {
	case apierrors.IsNotFound(err):
		return nil, true, fmt.Errorf("%w: the API has no pod %s/%s", ErrUnknown, record.Pod.Namespace, record.Pod.Name)
	case err != nil:
		return nil, false, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	pod, err = r.believe(record, fromAPI(found, r.c.Keep), s.IP, r.c.Watch.reporting(s.IP))
	return pod, !errors.Is(err, ErrAmbiguous), err
}

func (r *Resolver) askDuplicates(ctx context.Context, s Source, why error) (*Pod, error) {
	if !r.c.AskDuplicates || !r.lists.allow(s) {
		return nil, why
	}
	// It lists all pods of the node: a selector by status.podIP would match only the first address of a pod,
	// and a partial list could hide another pod that reports the address.
	list, err := r.c.API.ListPods(ctx, metav1.ListOptions{FieldSelector: fields.OneTermEqualSelector("spec.nodeName", r.c.Node).String()})
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	if list.Continue != "" {
		return nil, why
	}
	var reporting []*Pod
	for i := range list.Items {
		pod := fromAPI(&list.Items[i], r.c.Keep)
		if !pod.Finished && slices.Contains(pod.IPs, s.IP) {
			reporting = append(reporting, pod)
		}
	}
	if s.record == nil {
		return r.reported(reporting)
	}
	recorded := r.c.Watch.recorded(s.record.Pod)
	if recorded == nil {
		return nil, why
	}
	return r.believe(s.record, recorded, s.IP, reporting)
}
