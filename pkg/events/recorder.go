// Package events records Kubernetes Events about pods that get no credentials.
package events

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"log/slog"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/pods"
)

// API writes Events to the API server. kube.Client implements it.
type API interface {
	CreateEvent(ctx context.Context, e *corev1.Event) (*corev1.Event, error)
	PatchEvent(ctx context.Context, e *corev1.Event, patch []byte) (*corev1.Event, error)
}

// Recorder writes Events, one at a time and in the background. A repetition increments the count of the
// earlier Event, at most once in repeatInterval. Rates are limited by pod and by node. An Event over a
// limit is dropped: its cause recurs with the pod's next request, the next call to STS or the next
// resync, and is then recorded. (client-go's recorder would add two megabytes for patches of all types.)
//
// A Recorder is a pods.Watcher, to forget deleted pods.
type Recorder struct {
	api   API
	node  string
	log   *slog.Logger
	queue chan *corev1.Event

	mu    sync.Mutex
	limit *rate.Limiter // of all pods
	pods  map[types.UID]*podEvents
}

// podEvents is what was recorded about one pod.
type podEvents struct {
	limit  *rate.Limiter
	recent map[eventKey]*recentEvent
}

// eventKey identifies equal Events of one pod.
type eventKey struct{ reason, message string }

// recentEvent is an Event that was queued.
type recentEvent struct {
	event *corev1.Event
	next  time.Time // the earliest time of the next repetition
}

const (
	repeatInterval = 10 * time.Minute
	// retryInterval is how long an Event that was not written is not recorded again.
	retryInterval = time.Minute
	// podBurst and podInterval limit the Events of one pod, nodeBurst and nodeInterval those of all
	// pods: a failure of STS concerns all pods of all nodes.
	podBurst, podInterval   = 5, 5 * time.Minute
	nodeBurst, nodeInterval = 50, 2 * time.Second
	component               = "kube2iam-cni"
	// maxMessage and maxName are the API server's limits.
	maxMessage, maxName = 1024, 253
	// maxRecent, maxPods and maxQueue bound the memory. The annotations of a pod may change all the time.
	maxRecent, maxPods, maxQueue = 8, 4096, 256
	writeTimeout                 = 10 * time.Second
)

// New returns a recorder. It queues Events until Run writes them.
func New(api API, node string, log *slog.Logger) *Recorder {
	return &Recorder{
		api: api, node: node, log: log, queue: make(chan *corev1.Event, maxQueue),
		limit: rate.NewLimiter(rate.Every(nodeInterval), nodeBurst), pods: make(map[types.UID]*podEvents),
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
		patch, err := json.Marshal(map[string]any{"count": event.Count, "lastTimestamp": event.LastTimestamp})
		if err != nil {
			return err
		}
		// The API server deletes Events after an hour.
		if _, err = r.api.PatchEvent(ctx, event, patch); !apierrors.IsNotFound(err) {
			return err
		}
	}
	_, err := r.api.CreateEvent(ctx, event)
	return err
}

// Warn records that a pod gets no credentials. It does not block. The pod's owner can read the message.
func (r *Recorder) Warn(p *pods.Pod, reason, message string) {
	if len(message) > maxMessage {
		message = strings.ToValidUTF8(message[:maxMessage-3], "") + "..."
	}
	event := r.next(p, eventKey{reason, message}, time.Now())
	if event == nil {
		return
	}
	select {
	case r.queue <- event:
	default:
		r.retryLater(event)
	}
}

// retryLater lets an Event that was not written be recorded again after retryInterval.
func (r *Recorder) retryLater(event *corev1.Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if p := r.pods[event.InvolvedObject.UID]; p != nil {
		if recent := p.recent[eventKey{event.Reason, event.Message}]; recent != nil {
			recent.next = time.Now().Add(retryInterval)
		}
	}
}

// next returns the Event to write now, or nil if the limits allow none.
func (r *Recorder) next(p *pods.Pod, key eventKey, now time.Time) *corev1.Event {
	r.mu.Lock()
	defer r.mu.Unlock()
	of := r.pods[p.UID]
	if of == nil {
		if len(r.pods) >= maxPods {
			clear(r.pods)
		}
		of = &podEvents{limit: rate.NewLimiter(rate.Every(podInterval), podBurst), recent: make(map[eventKey]*recentEvent)}
		r.pods[p.UID] = of
	}
	earlier := of.recent[key]
	// The node's token is taken last, because a pod over its own limit must not use it up.
	if earlier != nil && now.Before(earlier.next) || r.limit.TokensAt(now) < 1 || !of.limit.AllowN(now, 1) || !r.limit.AllowN(now, 1) {
		return nil
	}
	var event *corev1.Event
	if earlier != nil {
		event = earlier.event.DeepCopy()
		event.Count++
		event.LastTimestamp = metav1.NewTime(now)
	} else {
		if len(of.recent) >= maxRecent {
			clear(of.recent)
		}
		event = r.newEvent(p, key, now)
	}
	of.recent[key] = &recentEvent{event: event, next: now.Add(repeatInterval)}
	return event
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

// Len returns the number of pods that are remembered.
func (r *Recorder) Len() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.pods)
}

// PodChanged implements pods.Watcher.
func (r *Recorder) PodChanged(*pods.Pod) {}

// PodGone implements pods.Watcher.
func (r *Recorder) PodGone(p *pods.Pod) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.pods, p.UID)
}
