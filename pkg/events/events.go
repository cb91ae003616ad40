// Package events tells the owners of pods, by Kubernetes Events on them, why they get no credentials.
package events

import (
	"context"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/tools/record"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/pods"
)

// Events writes Events to the API server, one at a time and in the background: of the same to the same pod one in a while, which
// client-go then counts up, and of all to one pod a few in a while. Where there are too many for the API server to take, some are lost.
//
// It is a Watcher, by which it learns which pods to forget.
type Events struct {
	broadcaster record.EventBroadcaster
	recorder    record.EventRecorder
	end         context.CancelFunc

	mu   sync.Mutex
	told map[types.UID]map[saying]time.Time
}

type saying struct{ reason, message string }

const (
	// pause is how long the same is not said again.
	pause = 10 * time.Minute
	// component is who says it.
	component = "kube2iam-cni"
	// maxMessage is the longest that the API server takes.
	maxMessage = 1024
	// maxSayings bounds what is remembered of one pod, whose annotations may change all the time, and maxTold the pods.
	maxSayings, maxTold = 8, 4096
)

// New is a writer, which writes until its Run ends.
func New(client kubernetes.Interface, node string) *Events {
	life, end := context.WithCancel(context.Background())
	// A burst of a few for one pod, then one in five minutes.
	b := record.NewBroadcaster(record.WithContext(life), record.WithCorrelatorOptions(record.CorrelatorOptions{BurstSize: 5, QPS: 1. / 300}))
	b.StartRecordingToSink(&typedcorev1.EventSinkImpl{Interface: client.CoreV1().Events("")}) // at once: what nobody records is lost
	return &Events{
		broadcaster: b, end: end, told: make(map[types.UID]map[saying]time.Time),
		recorder: b.NewRecorder(scheme.Scheme, corev1.EventSource{Component: component, Host: node}),
	}
}

// Run waits for the end of ctx, and ends the writing.
func (e *Events) Run(ctx context.Context) error {
	<-ctx.Done()
	e.end()
	e.broadcaster.Shutdown()
	return nil
}

// Refused is that a pod gets no credentials, and why. The message is for the pod's owner: it must hold nothing that is not his to know.
func (e *Events) Refused(p *pods.Pod, reason, message string) {
	if len(message) > maxMessage {
		message = strings.ToValidUTF8(message[:maxMessage-3], "") + "..."
	}
	if !e.due(p.UID, saying{reason, message}, time.Now()) {
		return
	}
	e.recorder.Event(&corev1.ObjectReference{
		APIVersion: "v1", Kind: "Pod", Namespace: p.Namespace, Name: p.Name, UID: p.UID, ResourceVersion: p.ResourceVersion,
	}, corev1.EventTypeWarning, reason, message)
}

// due tells whether something is to be said to a pod, for it was not said a while ago.
func (e *Events) due(pod types.UID, what saying, now time.Time) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	said := e.told[pod]
	if at, ok := said[what]; ok && now.Sub(at) < pause {
		return false
	}
	if said == nil || len(said) >= maxSayings {
		if len(e.told) >= maxTold {
			clear(e.told)
		}
		said = make(map[saying]time.Time)
		e.told[pod] = said
	}
	said[what] = now
	return true
}

// PodChanged implements pods.Watcher.
func (e *Events) PodChanged(*pods.Pod) {}

// PodGone implements pods.Watcher.
func (e *Events) PodGone(p *pods.Pod) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.told, p.UID)
}
