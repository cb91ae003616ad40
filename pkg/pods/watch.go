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

// Watcher is told of the pods of this node as the API reports them, in order and one at a time; its methods must not block.
type Watcher interface {
	PodChanged(*Pod)
	PodGone(*Pod)
}

// Watch keeps the pods that the API says are bound to this node, and nothing of them but what a Pod holds.
type Watch struct {
	informer cache.SharedIndexInformer
	synced   chan struct{}
	watcher  Watcher

	mu      sync.RWMutex
	byUID   map[types.UID]*Pod
	byIP    map[netip.Addr][]*Pod
	changed chan struct{} // closed and replaced at every change
}

// WatchConfig is what a Watch depends on.
type WatchConfig struct {
	API API
	// Node is the name of the node whose pods are watched.
	Node string
	// Keep tells which annotations are kept.
	Keep func(key string) bool
	// Resync is how often every pod is looked at again without a change; zero for never.
	Resync time.Duration
	// Watcher may be nil.
	Watcher Watcher
	Log     *slog.Logger
}

// NewWatch is a watch that begins with Run.
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

// Synced is closed once the pods that were there at the start are known, to the Watcher too.
func (w *Watch) Synced() <-chan struct{} { return w.synced }

// Run watches until ctx ends. While the API server is down, what is known stays.
func (w *Watch) Run(ctx context.Context) error {
	return runInformer(ctx, w.informer, cache.ResourceEventHandlerFuncs{
		AddFunc: func(obj any) { w.set(obj) },
		UpdateFunc: func(old, obj any) {
			// A watch that was away for a while reports a pod and its successor of the same name as one that changed.
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

// replace puts now in the place of what is known of the pod; nil removes it.
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

// recorded is the pod that an attachment record names, or nil: by its UID, or by its name where the record has none or has
// that of a static pod. A name alone is weak evidence, and what is found by it is the caller's to check.
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

// reporting is the pods that report the address and have not finished. The slice must not be changed.
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

// change is closed at the next change of any pod.
func (w *Watch) change() <-chan struct{} {
	w.mu.RLock()
	defer w.mu.RUnlock()
	return w.changed
}

// ready tells whether Synced is closed.
func (w *Watch) ready() bool {
	select {
	case <-w.synced:
		return true
	default:
		return false
	}
}

// Len is how many pods are known.
func (w *Watch) Len() int {
	w.mu.RLock()
	defer w.mu.RUnlock()
	return len(w.byUID)
}
