// Package events records Kubernetes Events about pods that get no credentials.
package events

import (
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"maps"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/pods"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/ratelimit"
)

// API writes Events to the API server. kube.Client implements it.
type API interface {
	CreateEvent(ctx context.Context, e *corev1.Event) (*corev1.Event, error)
	PatchEvent(ctx context.Context, e *corev1.Event, patch []byte) (*corev1.Event, error)
}

// Recorder writes Events, one at a time and in the background. A repetition increments the count of
// the earlier Event, at most once in repeatInterval. Rates are limited by pod and by node. An Event
// that is over a limit is dropped: its cause recurs with the pod's next request, the next call to STS
// or the next resync. One that cannot be written is written with a repetition after retryInterval.
//
// A Recorder is a pods.Watcher, to forget deleted pods.
type Recorder struct {
	api   API
	node  string
	log   *slog.Logger
	queue chan *corev1.Event

	podLimit  *ratelimit.Keyed[types.UID]
	nodeLimit *rate.Limiter

	mu     sync.Mutex
	recent map[eventKey]*corev1.Event // the Events that were queued
}

// eventKey identifies equal Events.
type eventKey struct {
	pod             types.UID
	reason, message string
}

const (
	repeatInterval = 10 * time.Minute
	// podBurst and podInterval limit the Events of one pod, nodeBurst and nodeInterval those of all
	// pods: a failure of STS concerns all pods of all nodes.
	podBurst, podInterval   = 5, 5 * time.Minute
	nodeBurst, nodeInterval = 50, 2 * time.Second
	component               = "kube2iam-cni"
	// maxMessage and maxName are the API server's limits.
	maxMessage, maxName = 1024, 253
	// maxRecent and maxQueue bound the memory: the annotations of a pod may change all the time.
	maxRecent, maxQueue = 4096, 256
	writeTimeout        = 10 * time.Second
	retryInterval       = time.Minute
)

// New returns a recorder. It queues Events until Run writes them.
func New(api API, node string, log *slog.Logger) *Recorder {
	return &Recorder{
		api: api, node: node, log: log, queue: make(chan *corev1.Event, maxQueue),
		podLimit:  ratelimit.NewKeyed[types.UID](rate.Every(podInterval), podBurst),
		nodeLimit: rate.NewLimiter(rate.Every(nodeInterval), nodeBurst), recent: make(map[eventKey]*corev1.Event),
	}
}

// Run writes Events until ctx ends.
func (r *Recorder) Run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case event := <-r.queue:
			if err := r.write(ctx, event); err != nil && ctx.Err() == nil {
				r.retryLater(event)
				r.log.Warn("cannot write event", "pod", event.Namespace+"/"+event.InvolvedObject.Name, "reason", event.Reason, "error", err)
			}
		}
	}
}

// write creates the Event, or patches its count.
func (r *Recorder) write(ctx context.Context, event *corev1.Event) error {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	if event.Count > 1 {
		patch := fmt.Appendf(nil, `{"count":%d,"lastTimestamp":%q}`, event.Count, event.LastTimestamp.UTC().Format(time.RFC3339))
		// The API server deletes Events after an hour.
		if _, err := r.api.PatchEvent(ctx, event, patch); !apierrors.IsNotFound(err) {
			return err
		}
	}
	_, err := r.api.CreateEvent(ctx, event)
	return err
}

// Warn records that a pod gets no credentials. It does not block. The pod's owner can read the
// message.
func (r *Recorder) Warn(p *pods.Pod, reason, message string) {
	if len(message) > maxMessage {
		message = strings.ToValidUTF8(message[:maxMessage-3], "") + "..."
	}
	if event := r.next(p, eventKey{p.UID, reason, message}, time.Now()); event != nil {
		select {
		case r.queue <- event:
		default: // the API server is down
			r.retryLater(event)
		}
	}
}

// next returns the Event to write now, or nil if the limits allow none.
func (r *Recorder) next(p *pods.Pod, key eventKey, now time.Time) *corev1.Event {
	r.mu.Lock()
	defer r.mu.Unlock()
	earlier := r.recent[key]
	// The node's token is taken last, because a pod over its own limit must not use it up.
	if earlier != nil && now.Sub(earlier.LastTimestamp.Time) < repeatInterval || r.nodeLimit.TokensAt(now) < 1 || !r.podLimit.Allow(p.UID, now) || !r.nodeLimit.AllowN(now, 1) {
		return nil
	}
	event := r.newEvent(p, key, now)
	if earlier != nil {
		event = earlier.DeepCopy()
		event.Count++
		event.LastTimestamp = metav1.NewTime(now)
	} else if len(r.recent) >= maxRecent {
		clear(r.recent)
	}
	r.recent[key] = event
	return event
}

// retryLater lets the next Warn that repeats an Event write it after retryInterval.
func (r *Recorder) retryLater(event *corev1.Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	key := eventKey{event.InvolvedObject.UID, event.Reason, event.Message}
	if r.recent[key] != event {
		return // its pod is gone
	}
	later := event.DeepCopy()
	later.Count-- // it was not written
	later.LastTimestamp = metav1.NewTime(time.Now().Add(retryInterval - repeatInterval))
	r.recent[key] = later
}

func (r *Recorder) newEvent(p *pods.Pod, key eventKey, now time.Time) *corev1.Event {
	suffix := "." + strings.ToLower(rand.Text())
	return &corev1.Event{
		ObjectMeta:     metav1.ObjectMeta{Namespace: p.Namespace, Name: p.Name[:min(len(p.Name), maxName-len(suffix))] + suffix},
		InvolvedObject: corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: p.Namespace, Name: p.Name, UID: p.UID, ResourceVersion: p.ResourceVersion},
		Reason:         key.reason, Message: key.message, Type: corev1.EventTypeWarning, Count: 1,
		FirstTimestamp: metav1.NewTime(now), LastTimestamp: metav1.NewTime(now),
		Source:              corev1.EventSource{Component: component, Host: r.node},
		ReportingController: component, ReportingInstance: r.node,
	}
}

// Len returns the number of Events that are remembered.
func (r *Recorder) Len() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.recent)
}

// PodChanged implements pods.Watcher.
func (r *Recorder) PodChanged(*pods.Pod) {}

// PodGone implements pods.Watcher.
func (r *Recorder) PodGone(p *pods.Pod) {
	r.mu.Lock()
	defer r.mu.Unlock()
	maps.DeleteFunc(r.recent, func(key eventKey, _ *corev1.Event) bool { return key.pod == p.UID })
}
