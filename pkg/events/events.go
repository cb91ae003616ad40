// Package events tells the owners of pods, by Kubernetes Events on them, why they get no credentials.
package events

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
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

// API is what of the Kubernetes API this package asks, as kube.Client does.
type API interface {
	CreateEvent(ctx context.Context, e *corev1.Event) (*corev1.Event, error)
	PatchEvent(ctx context.Context, e *corev1.Event, patch []byte) (*corev1.Event, error)
}

// Events writes Events to the API server, one at a time and in the background. What is said again is counted up in the Event that said
// it before, at most once in a while, and of one pod, and of a node, a few Events are written in a while. What there is no room for is lost, and
// said again by what is still wrong: the pod asks again, STS refuses again, every pod is looked at again now and then.
//
// It is a Watcher, by which it learns which pods to forget. (client-go's recorder does as much, and links what merges patches of
// every kind of object: two megabytes.)
type Events struct {
	api   API
	node  string
	log   *slog.Logger
	queue chan queued

	mu    sync.Mutex
	limit *rate.Limiter // of this node
	pods  map[types.UID]*told
}

// queued is an Event to be written, and what it says.
type queued struct {
	event *corev1.Event
	what  saying
}

// told is what was said of one pod.
type told struct {
	limit   *rate.Limiter
	sayings map[saying]*said
}

type saying struct{ reason, message string }

type said struct {
	at    time.Time
	event *corev1.Event // as it was last queued
}

const (
	// pause is how long the same is not said again.
	pause = 10 * time.Minute
	// again is the same for what could not be written.
	again = time.Minute
	// burst is how many Events there are of one pod at once, and every how often there is one more; nodeBurst and nodeEvery are those of
	// all pods of a node together: what is wrong with STS is wrong for all of them, on every node.
	burst, every         = 5, 5 * time.Minute
	nodeBurst, nodeEvery = 50, 2 * time.Second
	// component is who says it.
	component = "kube2iam-cni"
	// maxMessage is the longest that the API server takes.
	maxMessage = 1024
	// maxSayings bounds what is remembered of one pod, whose annotations may change all the time, maxPods the pods, and maxQueue what
	// waits for the API server.
	maxSayings, maxPods, maxQueue = 8, 4096, 256
	// writeTime bounds one call.
	writeTime = 10 * time.Second
)

// New is a writer that begins with Run; what is told before waits.
func New(api API, node string, log *slog.Logger) *Events {
	return &Events{
		api: api, node: node, log: log, queue: make(chan queued, maxQueue),
		limit: rate.NewLimiter(rate.Every(nodeEvery), nodeBurst), pods: make(map[types.UID]*told),
	}
}

// Run writes until ctx ends.
func (e *Events) Run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case q := <-e.queue:
			event := q.event
			if err := e.write(ctx, event); err != nil && ctx.Err() == nil {
				e.lost(q)
				e.log.Warn("an event could not be written", "pod", event.Namespace+"/"+event.InvolvedObject.Name, "reason", event.Reason, "error", err)
			}
		}
	}
}

// write creates the Event, or counts it up.
func (e *Events) write(ctx context.Context, event *corev1.Event) error {
	ctx, cancel := context.WithTimeout(ctx, writeTime)
	defer cancel()
	if event.Count > 1 {
		patch, err := json.Marshal(map[string]any{"count": event.Count, "lastTimestamp": event.LastTimestamp})
		if err != nil {
			return err
		}
		if _, err = e.api.PatchEvent(ctx, event, patch); !apierrors.IsNotFound(err) {
			return err
		}
		// Events are kept for an hour.
	}
	_, err := e.api.CreateEvent(ctx, event)
	return err
}

// Refused is that a pod gets no credentials, and why. The message is for the pod's owner: it must hold nothing that is not his to know.
func (e *Events) Refused(p *pods.Pod, reason, message string) {
	if len(message) > maxMessage {
		message = strings.ToValidUTF8(message[:maxMessage-3], "") + "..."
	}
	what := saying{reason, message}
	event := e.due(p, what, time.Now())
	if event == nil {
		return
	}
	q := queued{event, what}
	select {
	case e.queue <- q:
	default:
		e.lost(q)
	}
}

// lost has what was not written be said again soon, if it still is to be.
func (e *Events) lost(q queued) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if of := e.pods[q.event.InvolvedObject.UID]; of != nil && of.sayings[q.what] != nil {
		of.sayings[q.what].at = time.Now().Add(again - pause)
	}
}

// due is the Event to write, nil where there is none to write now.
func (e *Events) due(p *pods.Pod, what saying, now time.Time) *corev1.Event {
	e.mu.Lock()
	defer e.mu.Unlock()
	of := e.pods[p.UID]
	if of == nil {
		if len(e.pods) >= maxPods {
			clear(e.pods)
		}
		of = &told{limit: rate.NewLimiter(rate.Every(every), burst), sayings: make(map[saying]*said)}
		e.pods[p.UID] = of
	}
	before := of.sayings[what]
	if before != nil && now.Sub(before.at) < pause || e.limit.TokensAt(now) < 1 || !of.limit.AllowN(now, 1) {
		return nil
	}
	e.limit.AllowN(now, 1)
	var event *corev1.Event
	if before != nil {
		event = before.event.DeepCopy()
		event.Count++
		event.LastTimestamp = metav1.NewTime(now)
	} else {
		if len(of.sayings) >= maxSayings {
			clear(of.sayings)
		}
		event = e.event(p, what, now)
	}
	of.sayings[what] = &said{at: now, event: event}
	return event
}

func (e *Events) event(p *pods.Pod, what saying, now time.Time) *corev1.Event {
	name := p.Name
	if most := 253 - 27; len(name) > most { // the longest name of an object, with what is added
		name = name[:most]
	}
	return &corev1.Event{
		ObjectMeta:     metav1.ObjectMeta{Namespace: p.Namespace, Name: fmt.Sprintf("%s.%s", name, strings.ToLower(rand.Text()))},
		InvolvedObject: corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: p.Namespace, Name: p.Name, UID: p.UID, ResourceVersion: p.ResourceVersion},
		Reason:         what.reason, Message: what.message, Type: corev1.EventTypeWarning, Count: 1,
		FirstTimestamp: metav1.NewTime(now), LastTimestamp: metav1.NewTime(now),
		Source:              corev1.EventSource{Component: component, Host: e.node},
		ReportingController: component, ReportingInstance: e.node,
	}
}

// Len is how many pods something is remembered of.
func (e *Events) Len() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.pods)
}

// PodChanged implements pods.Watcher.
func (e *Events) PodChanged(*pods.Pod) {}

// PodGone implements pods.Watcher.
func (e *Events) PodGone(p *pods.Pod) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.pods, p.UID)
}
