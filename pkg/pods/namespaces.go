package pods

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"slices"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/utils/clock"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/dedup"
)

var (
	// ErrNoNamespace is the error of a namespace that does not exist in the API.
	ErrNoNamespace = errors.New("the namespace does not exist")
	// ErrNotSynced is the error of a namespace that is not watched, or whose state the API server has
	// not sent yet.
	ErrNotSynced = errors.New("the namespace is not known yet")
)

// Namespaces watches the annotations of the namespaces that have pods on this node. It watches no
// other namespaces, so a node's load on the API server does not grow with the cluster. It is a
// Watcher, and receives the pods by its methods.
type Namespaces struct {
	c NamespacesConfig

	mu      sync.Mutex
	start   func(*namespace) // starts a watch during Run; does nothing before and after it
	watched map[string]*namespace
}

// namespace is a watched namespace, with the state that the API reported last. Namespaces.mu guards
// it.
type namespace struct {
	name   string
	pods   map[types.UID]bool
	stop   func()        // ends the watch
	synced chan struct{} // closed once the API has reported whether the namespace exists

	exists      bool
	annotations map[string]string
}

// NamespacesConfig holds the dependencies and settings of Namespaces.
type NamespacesConfig struct {
	API API
	// Keys are the keys of the annotations to store.
	Keys []string
	// Changed is called with the name of each namespace whose annotations changed. It must not block.
	Changed func(namespace string)
	Log     *slog.Logger
}

// NewNamespaces returns Namespaces that watch no namespace yet.
func NewNamespaces(c NamespacesConfig) *Namespaces {
	// If the API server is down, the watches of all namespaces fail with the same error.
	c.Log = slog.New(dedup.New(c.Log.Handler(), retryReset))
	return &Namespaces{c: c, start: func(*namespace) {}, watched: make(map[string]*namespace)}
}

// Run watches until ctx ends.
func (n *Namespaces) Run(ctx context.Context) error {
	var watches sync.WaitGroup
	n.mu.Lock()
	n.start = func(w *namespace) {
		ctx, stop := context.WithCancel(ctx)
		w.stop = stop
		watches.Go(func() { n.watch(ctx, w) })
	}
	for _, w := range n.watched { // the namespaces of pods that were received before Run
		n.start(w)
	}
	n.mu.Unlock()
	<-ctx.Done()
	n.mu.Lock()
	n.start = func(*namespace) {}
	n.mu.Unlock()
	watches.Wait()
	return nil
}

// PodChanged implements Watcher. It watches the pod's namespace until the pod finishes or is gone.
func (n *Namespaces) PodChanged(p *Pod) {
	if p.Finished || p.HostNetwork {
		n.PodGone(p)
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	w := n.watched[p.Namespace]
	if w == nil {
		w = &namespace{name: p.Namespace, pods: make(map[types.UID]bool), stop: func() {}, synced: make(chan struct{})}
		n.watched[p.Namespace] = w
		n.start(w)
	}
	w.pods[p.UID] = true
}

// PodGone implements Watcher.
func (n *Namespaces) PodGone(p *Pod) {
	n.mu.Lock()
	defer n.mu.Unlock()
	w := n.watched[p.Namespace]
	if w == nil {
		return
	}
	if delete(w.pods, p.UID); len(w.pods) == 0 {
		w.stop()
		delete(n.watched, p.Namespace)
	}
}

// Len returns the number of watched namespaces.
func (n *Namespaces) Len() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.watched)
}

// HasSynced reports whether the API server has sent the state of every watched namespace.
func (n *Namespaces) HasSynced() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, w := range n.watched {
		if !isClosed(w.synced) {
			return false
		}
	}
	return true
}

// Wait waits until the API server has sent the state of the namespace, or ctx ends. It returns at
// once if the namespace is not watched.
func (n *Namespaces) Wait(ctx context.Context, name string) {
	n.mu.Lock()
	w := n.watched[name]
	n.mu.Unlock()
	if w == nil {
		return
	}
	select {
	case <-w.synced:
	case <-ctx.Done():
	}
}

// Annotations returns the stored annotations of a namespace that has pods on this node. The caller
// must not change the map. The error wraps ErrNoNamespace or ErrNotSynced.
func (n *Namespaces) Annotations(name string) (map[string]string, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	w := n.watched[name]
	switch {
	case w == nil:
		return nil, fmt.Errorf("%w: %s has no pod here that the API has shown", ErrNotSynced, name)
	case !isClosed(w.synced):
		return nil, fmt.Errorf("%w: %s", ErrNotSynced, name)
	case !w.exists:
		return nil, fmt.Errorf("%w: %s", ErrNoNamespace, name)
	}
	return w.annotations, nil
}

// watch watches the namespace until ctx ends. While the API server is down, it keeps the stored
// state.
func (n *Namespaces) watch(ctx context.Context, w *namespace) {
	backoff := wait.Backoff{Duration: firstRetry, Cap: lastRetry, Steps: math.MaxInt, Factor: 2, Jitter: 1}
	backoff.DelayWithReset(clock.RealClock{}, retryReset).Until(ctx, true, true, func(ctx context.Context) (done bool, _ error) {
		err := n.c.API.FollowNamespace(ctx, w.name, func(annotations map[string]string, exists bool) {
			n.set(w, annotations, exists)
		})
		if err != nil && ctx.Err() == nil {
			n.c.Log.Warn("watching a namespace failed; trying again", "namespace", w.name, "error", err)
		}
		return false, nil
	})
}

// The backoff between two watches. Its values are those of client-go's reflectors.
const (
	firstRetry = 800 * time.Millisecond
	lastRetry  = 30 * time.Second
	retryReset = 2 * time.Minute
)

// set stores the state of the namespace, and calls Changed if it differs from the stored one.
func (n *Namespaces) set(w *namespace, annotations map[string]string, exists bool) {
	selected := maps.Clone(annotations)
	maps.DeleteFunc(selected, func(key, _ string) bool { return !slices.Contains(n.c.Keys, key) })
	n.mu.Lock()
	wasSynced := isClosed(w.synced)
	isChanged := !wasSynced || w.exists != exists || !maps.Equal(w.annotations, selected)
	w.exists, w.annotations = exists, selected
	if !wasSynced {
		close(w.synced)
	}
	n.mu.Unlock()
	if isChanged {
		n.c.Changed(w.name)
	}
}
