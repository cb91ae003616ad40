package pods

import (
	"context"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/cache"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
)

// Watcher receives the changes of this node's pods, in order and one at a time. Its methods must not
// block.
type Watcher interface {
	PodChanged(*Pod)
	PodGone(*Pod)
}

// Watch stores the pods that are bound to this node, as the API reports them.
type Watch struct {
	informer cache.SharedIndexInformer
	synced   chan struct{}
	watcher  Watcher

	mu      sync.RWMutex
	byUID   map[types.UID]*Pod
	byIP    map[netip.Addr][]*Pod
	changed chan struct{} // closed and replaced at every change
}

// WatchConfig holds the dependencies and settings of a Watch.
type WatchConfig struct {
	API API
	// Node is the name of the node whose pods are watched.
	Node string
	// Keep reports whether to store the annotation of a key.
	Keep func(key string) bool
	// Resync is the interval at which the Watcher receives every pod again; zero for never.
	Resync time.Duration
	// Watcher may be nil.
	Watcher Watcher
	Log     *slog.Logger
}

// NewWatch returns a Watch that begins with Run.
func NewWatch(c WatchConfig) (*Watch, error) {
	informer := cache.NewSharedIndexInformer(podsOf(c.Node, c.API), &corev1.Pod{}, c.Resync, cache.Indexers{})
	err := informer.SetTransform(func(obj any) (any, error) {
		if p, ok := obj.(*corev1.Pod); ok {
			return fromAPI(p, c.Keep), nil
		}
		return obj, nil
	})
	if err != nil {
		return nil, err
	}
	err = informer.SetWatchErrorHandlerWithContext(func(ctx context.Context, _ *cache.Reflector, err error) {
		if ctx.Err() == nil {
			c.Log.Warn("watching the API server failed; trying again", "resource", "pods", "error", err)
		}
	})
	if err != nil {
		return nil, err
	}
	return &Watch{
		informer: informer,
		synced:   make(chan struct{}),
		watcher:  c.Watcher,
		byUID:    make(map[types.UID]*Pod),
		byIP:     make(map[netip.Addr][]*Pod),
		changed:  make(chan struct{}),
	}, nil
}

// Synced returns a channel that is closed when the initial list is stored and the Watcher has received it.
func (w *Watch) Synced() <-chan struct{} { return w.synced }

// Run watches until ctx ends. While the API server is down, the stored pods remain.
func (w *Watch) Run(ctx context.Context) error {
	return runInformer(ctx, w.informer, cache.ResourceEventHandlerFuncs{
		AddFunc: func(obj any) { w.set(obj) },
		UpdateFunc: func(old, obj any) {
			// After an interruption, the watch reports a pod and its successor of the same name as one change.
			if o, n := old.(*Pod), obj.(*Pod); o.UID != n.UID {
				w.unset(o)
			}
			w.set(obj)
		},
		DeleteFunc: func(obj any) { w.unset(obj) },
	}, w.synced)
}

func (w *Watch) set(obj any) {
	p, ok := obj.(*Pod)
	if !ok {
		return
	}
	w.replace(p.UID, p)
	if w.watcher != nil {
		w.watcher.PodChanged(p)
	}
}

func (w *Watch) unset(obj any) {
	p, ok := lastKnown(obj).(*Pod)
	if !ok {
		return
	}
	w.replace(p.UID, nil)
	if w.watcher != nil {
		w.watcher.PodGone(p)
	}
}

// replace stores now as the pod of the UID. A nil now removes the pod.
func (w *Watch) replace(uid types.UID, now *Pod) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if old := w.byUID[uid]; old != nil {
		for _, ip := range old.IPs {
			w.byIP[ip] = slices.DeleteFunc(slices.Clone(w.byIP[ip]), func(p *Pod) bool { return p.UID == uid })
			if len(w.byIP[ip]) == 0 {
				delete(w.byIP, ip)
			}
		}
		delete(w.byUID, uid)
	}
	if now != nil {
		w.byUID[uid] = now
		for _, ip := range now.IPs {
			w.byIP[ip] = append(slices.Clone(w.byIP[ip]), now)
		}
	}
	close(w.changed)
	w.changed = make(chan struct{})
}

// recorded returns the pod of an attachment record, or nil. It looks the pod up by UID, and by name if
// the record has no UID or a static pod's. The caller must verify a pod that was found by name.
func (w *Watch) recorded(r attachment.Pod) *Pod {
	w.mu.RLock()
	p := w.byUID[types.UID(r.UID)]
	w.mu.RUnlock()
	if p != nil {
		return p
	}
	obj, ok, err := w.informer.GetStore().GetByKey(r.Namespace + "/" + r.Name)
	if err != nil || !ok {
		return nil
	}
	p, _ = obj.(*Pod)
	return p
}

// reporting returns the unfinished pods that report the address. The caller must not change the slice.
func (w *Watch) reporting(ip netip.Addr) []*Pod {
	w.mu.RLock()
	pods := w.byIP[ip]
	w.mu.RUnlock()
	if !slices.ContainsFunc(pods, finished) {
		return pods
	}
	return slices.DeleteFunc(slices.Clone(pods), finished)
}

func finished(p *Pod) bool { return p.Finished }

// change returns a channel that is closed at the next change of any pod.
func (w *Watch) change() <-chan struct{} {
	w.mu.RLock()
	defer w.mu.RUnlock()
	return w.changed
}

// ready reports whether Synced is closed.
func (w *Watch) ready() bool {
	select {
	case <-w.synced:
		return true
	default:
		return false
	}
}

// Len returns the number of stored pods.
func (w *Watch) Len() int {
	w.mu.RLock()
	defer w.mu.RUnlock()
	return len(w.byUID)
}
