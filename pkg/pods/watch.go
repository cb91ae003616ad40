package pods

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
)

// API is the part of the Kubernetes API that this package uses. kube.Client implements it.
type API interface {
	ListPods(ctx context.Context, o metav1.ListOptions) (*corev1.PodList, error)
	WatchPods(ctx context.Context, o metav1.ListOptions) (watch.Interface, error)
	GetPod(ctx context.Context, namespace, name string) (*corev1.Pod, error)
	FollowNamespace(ctx context.Context, name string, report func(annotations map[string]string, exists bool)) error
}

// Watcher receives the changes of this node's pods, in order and one at a time. Its methods must
// not block.
type Watcher interface {
	PodChanged(*Pod)
	PodGone(*Pod)
}

// Watch stores the pods that are bound to this node, as the API reports them.
type Watch struct {
	c          WatchConfig
	controller cache.Controller
	pods       cache.Indexer
	synced     <-chan struct{}

	mu      sync.Mutex
	changed chan struct{} // closed and replaced at every change
}

// WatchConfig holds the dependencies and settings of a Watch.
type WatchConfig struct {
	API API
	// Node is the name of the node whose pods are watched.
	Node string
	// Keep reports whether to store the annotation with this key.
	Keep func(key string) bool
	// Resync is the interval at which the Watcher receives every pod again; zero for never.
	Resync  time.Duration
	Watcher Watcher
}

// The indices of the stored pods.
const uidIndex, ipIndex = "uid", "ip"

// NewWatch returns a Watch. Run starts it.
func NewWatch(c WatchConfig) *Watch {
	w := &Watch{c: c, changed: make(chan struct{})}
	selector := fields.OneTermEqualSelector("spec.nodeName", c.Node).String()
	store, controller := cache.NewInformerWithOptions(cache.InformerOptions{
		ObjectType: &corev1.Pod{},
		ListerWatcher: cache.ToListWatcherWithWatchListSemantics(&cache.ListWatch{
			ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
				o.FieldSelector = selector
				return c.API.ListPods(ctx, o)
			},
			WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
				o.FieldSelector = selector
				return c.API.WatchPods(ctx, o)
			},
		}, c.API),
		ResyncPeriod: c.Resync,
		Transform: func(obj any) (any, error) {
			if p, ok := obj.(*corev1.Pod); ok {
				return fromAPI(p, c.Keep), nil
			}
			return obj, nil
		},
		Indexers: cache.Indexers{
			uidIndex: func(obj any) ([]string, error) { return []string{string(obj.(*Pod).UID)}, nil },
			ipIndex:  func(obj any) ([]string, error) { return obj.(*Pod).reportedIPs(), nil },
		},
		Handler: cache.ResourceEventHandlerFuncs{
			AddFunc: func(obj any) { w.podChanged(obj.(*Pod)) },
			UpdateFunc: func(old, obj any) {
				// After an interruption, the watch reports the replacement of a pod by another one of the
				// same name as one change.
				if old := old.(*Pod); old.UID != obj.(*Pod).UID {
					w.podGone(old)
				}
				w.podChanged(obj.(*Pod))
			},
			DeleteFunc: func(obj any) {
				if missed, ok := obj.(cache.DeletedFinalStateUnknown); ok {
					obj = missed.Obj
				}
				w.podGone(obj.(*Pod))
			},
		},
	})
	w.controller, w.pods, w.synced = controller, store.(cache.Indexer), controller.HasSyncedChecker().Done()
	return w
}

// Run watches until ctx ends. While the API server is down, it keeps the stored pods.
func (w *Watch) Run(ctx context.Context) error {
	w.controller.RunWithContext(ctx)
	return nil
}

// Synced returns a channel that is closed when the initial list is stored and the Watcher has
// received it.
func (w *Watch) Synced() <-chan struct{} { return w.synced }

// Len returns the number of stored pods.
func (w *Watch) Len() int { return len(w.pods.ListKeys()) }

func (w *Watch) podChanged(p *Pod) {
	w.c.Watcher.PodChanged(p)
	w.notify()
}

func (w *Watch) podGone(p *Pod) {
	w.c.Watcher.PodGone(p)
	w.notify()
}

// notify closes the channel that change returned.
func (w *Watch) notify() {
	w.mu.Lock()
	defer w.mu.Unlock()
	close(w.changed)
	w.changed = make(chan struct{})
}

// change returns a channel that is closed at the next change of any pod.
func (w *Watch) change() <-chan struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.changed
}

// recorded returns the pod of an attachment record, or nil. It looks the pod up by UID, then by
// name: the record may have no UID, or that of a static pod. The caller must verify the pod,
// because a later one may have the same name.
func (w *Watch) recorded(r attachment.Pod) *Pod {
	if pods := w.indexed(uidIndex, r.UID); len(pods) > 0 {
		return pods[0]
	}
	if obj, ok, err := w.pods.GetByKey(r.Namespace + "/" + r.Name); err == nil && ok {
		return obj.(*Pod)
	}
	return nil
}

// reporting returns the unfinished pods that report the address.
func (w *Watch) reporting(ip netip.Addr) []*Pod { return w.indexed(ipIndex, ip.String()) }

func (w *Watch) indexed(index, value string) []*Pod {
	objs, err := w.pods.ByIndex(index, value)
	if err != nil {
		panic(err) // there is no such index
	}
	pods := make([]*Pod, len(objs))
	for i, obj := range objs {
		pods[i] = obj.(*Pod)
	}
	slices.SortFunc(pods, func(a, b *Pod) int { return strings.Compare(a.Name, b.Name) })
	return pods
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}
