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
	// ErrNotAPod: the address was given to a container that the runtime did not call a pod.
	ErrNotAPod = errors.New("the address is held by a container that is no pod")
	// ErrAmbiguous: another pod that runs on this node reports the address too.
	ErrAmbiguous = errors.New("more than one pod of this node has the address")
	// ErrFinished: the pod that holds the address has ended.
	ErrFinished = errors.New("the pod has finished")
	// ErrUnavailable: the Kubernetes API could not be asked, so it is not known which pod it is.
	ErrUnavailable = errors.New("the Kubernetes API does not answer")
	// ErrAskedTooOften: the proxy itself does not ask the API more often, so it is not known which pod it is.
	ErrAskedTooOften = fmt.Errorf("the proxy asks the API server at most %d times a second for a pod, %d times for the node", podGets, nodeGets)
)

// podGets and nodeGets are how many pods a second the API server is asked for.
const podGets, nodeGets = 2, 20

// Resolver finds the pod behind a source address.
type Resolver struct {
	c ResolverConfig
	// These bound what requests can make the API server do: get a pod, and list all of the node's, which costs more.
	gets, lists *limiter
}

// ResolverConfig is what a Resolver depends on.
type ResolverConfig struct {
	Records *attachment.Index
	Watch   *Watch
	// API is asked where the watch has not seen a pod yet that a record names.
	API API
	// Node is this node's name.
	Node string
	// Keep tells which annotations are kept.
	Keep func(key string) bool
	// MaxElapsed is how long an address may take to become known; zero for no wait. MaxInterval bounds the time between
	// two looks.
	MaxElapsed, MaxInterval time.Duration
	// AskDuplicates asks the API server itself when more than one pod seems to have an address.
	AskDuplicates bool
}

// NewResolver is a resolver over records and watch.
func NewResolver(c ResolverConfig) *Resolver {
	return &Resolver{c: c, gets: newLimiter(nodeGets, 20, podGets, 4), lists: newLimiter(2, 4, 0.5, 2)}
}

// limiter bounds how often all pods together do something, and within that each pod, so that none uses up its neighbours' part.
type limiter struct {
	node *rate.Limiter
	pods *ratelimit.Keyed[string]
}

func newLimiter(node rate.Limit, nodeBurst int, pod rate.Limit, podBurst int) *limiter {
	return &limiter{node: rate.NewLimiter(node, nodeBurst), pods: ratelimit.NewKeyed[string](pod, podBurst)}
}

// allow tells whether the API may be asked for the pod of s now. A pod with several addresses is one pod.
func (l *limiter) allow(s Source) bool {
	now := time.Now()
	return l.pods.Allow(cmp.Or(s.Holder(), s.IP.String()), now) && l.node.AllowN(now, 1)
}

// Source is a source address and who holds it by the records of this node, as of one moment.
type Source struct {
	IP       netip.Addr
	record   *attachment.Record
	reported string // the UID of the one pod that reports the address, where no record can be read
	err      error
}

// Same tells whether the address has the same holder in both.
func (s Source) Same(other Source) bool {
	if s.IP != other.IP || s.err != nil || other.err != nil {
		return false
	}
	if s.record == nil || other.record == nil {
		// Where nobody reported it yet, the pod has become known since.
		return s.record == other.record && (s.reported == "" || s.reported == other.reported)
	}
	return s.record.ID() == other.record.ID() && s.record.Pod == other.record.Pod
}

// Source looks the address up in the records, which asks nobody and takes a system call.
func (r *Resolver) Source(ip netip.Addr) Source {
	record, err := r.c.Records.Holder(ip)
	s := Source{IP: ip, record: record, err: err}
	if record == nil && r.c.Watch != nil {
		if reporting := r.c.Watch.reporting(ip); len(reporting) == 1 {
			s.reported = string(cmp.Or(reporting[0].Mirror, reporting[0].UID))
		}
	}
	return s
}

// Holder returns the UID of the pod that the records say holds the address, or else of the pod that reports it, or else
// an empty string. The value does not change when a record is written for the pod later.
func (s Source) Holder() string {
	if s.record == nil {
		return s.reported
	}
	return s.record.Pod.UID
}

// Identity tells the address's holder from every other one: by its pod's UID, which is the same once a pod without a record is
// put on record, or by its attachment where the record has no UID. It is empty where nothing tells who holds the address.
func (s Source) Identity() string {
	switch {
	case s.err != nil:
		return "a holder whose record cannot be read"
	case s.record != nil && s.record.Pod.UID == "":
		return s.record.ID()
	}
	return s.Holder()
}

// String is the pod that the records say holds the address, or the address.
func (s Source) String() string {
	if s.record == nil || s.record.Pod.Name == "" {
		return s.IP.String()
	}
	return s.record.Pod.Namespace + "/" + s.record.Pod.Name
}

// Resolve is the pod that holds the source's address. Where it is not known yet, or seems to be two pods', it waits for that
// to change, at most MaxElapsed. The error wraps one of this package's, or is that of ctx.
func (r *Resolver) Resolve(ctx context.Context, s Source) (*Pod, error) {
	pod, err := r.lookup(s)
	if err == nil || final(err) {
		return pod, err
	}
	return r.await(ctx, s.IP, err)
}

// final tells that waiting does not help.
func final(err error) bool { return errors.Is(err, ErrNotAPod) || errors.Is(err, ErrFinished) }

func (r *Resolver) lookup(s Source) (*Pod, error) {
	record := s.record
	if !r.c.Watch.ready() {
		// With half a list, a pod that seems to be the only one with the address may not be.
		return nil, fmt.Errorf("%w: the pods of this node are not known yet", ErrUnavailable)
	}
	if s.err != nil {
		// An entry that cannot be read says that somebody holds the address, so what pods report is no answer.
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

// reported is the pod without a record that reports the address, where it is the only one. One that is being deleted may
// have given the address back already, and only a record would tell whose it is.
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

// believe is the pod that the record names, where the API agrees: it is that very pod, it is on this node and has not
// finished, and no other running pod reports the address. A record is the word of the moment the address was given; the
// address may have gone on to another since, if the DEL never came.
func (r *Resolver) believe(record *attachment.Record, pod *Pod, ip netip.Addr, reporting []*Pod) (*Pod, error) {
	name := pod.String()
	switch recorded := types.UID(record.Pod.UID); {
	case pod.Namespace != record.Pod.Namespace || pod.Name != record.Pod.Name:
		return nil, fmt.Errorf("%w: the record names %s/%s, the API calls it %s", ErrUnknown, record.Pod.Namespace, record.Pod.Name, name)
	case recorded == "":
		// An old runtime: without a UID, only the pod's own word for the address tells it from a namesake that came later.
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

// await looks again at every change that the API reports and in between, and asks the API itself for the pod that a record
// names, because the request of a first container may be faster than any watch.
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

// ask asks the API server for what the watch has not shown. done tells that its answer is the last word, for better or
// worse: what it says of a pod is newer than anything that a watch could still show. why is the lookup's error, and the
// answer's where asking does not help.
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
	// All of the node's: status.podIP would be the first address of a pod only, and what is left out of a list would pass for one that
	// nobody else reports.
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
