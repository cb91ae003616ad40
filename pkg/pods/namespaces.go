package pods

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/utils/clock"
)

var (
	// ErrNoNamespace is the error of a namespace that the API says does not exist.
	ErrNoNamespace = errors.New("the namespace does not exist")
	// ErrNotShown is the error of a namespace that the API has not shown yet. It may a moment later.
	ErrNotShown = errors.New("the namespace is not known yet")
)

// Namespaces watches the annotations of the namespaces that have pods on this node, and no others, so
// that a node's load on the API server does not grow with the cluster. As a Watcher it receives the pods.
type Namespaces struct {
	api     API
	keys    []string
	changed func(namespace string)
	log     *slog.Logger

	life context.Context // that of every watch
	end  context.CancelFunc
	runs sync.WaitGroup

	mu      sync.Mutex
	closed  bool
	watched map[string]*watchedNamespace
}

// watchedNamespace is a namespace in the state that the API reported last.
type watchedNamespace struct {
	of     *Namespaces
	name   string
	pods   map[types.UID]bool // guarded by of.mu
	cancel context.CancelFunc
	synced chan struct{} // closed once the API has reported whether it exists

	mu          sync.Mutex
	shown       bool // whether synced is closed
	exists      bool
	annotations map[string]string
}

// NamespacesConfig holds the dependencies and settings of Namespaces.
type NamespacesConfig struct {
	API API
	// Keys are the annotations to store.
	Keys []string
	// Changed is called with the name of each namespace whose annotations changed. It must not block, and
	// may be nil.
	Changed func(namespace string)
	Log     *slog.Logger
}

// NewNamespaces returns Namespaces that watch no namespace yet.
func NewNamespaces(c NamespacesConfig) *Namespaces {
	life, end := context.WithCancel(context.Background())
	if c.Changed == nil {
		c.Changed = func(string) {}
	}
	return &Namespaces{api: c.API, keys: c.Keys, changed: c.Changed, log: c.Log, life: life, end: end, watched: make(map[string]*watchedNamespace)}
}

// Run waits for the end of ctx, and then ends the watches.
func (n *Namespaces) Run(ctx context.Context) error {
	<-ctx.Done()
	n.mu.Lock()
	n.closed = true
	n.mu.Unlock()
	n.end()
	n.runs.Wait()
	return nil
}

// PodChanged implements Watcher. The pod's namespace is watched until the pod finishes or is gone.
func (n *Namespaces) PodChanged(p *Pod) {
	if p.Finished || p.HostNetwork {
		n.PodGone(p)
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	w := n.watched[p.Namespace]
	if w == nil {
		if n.closed {
			return
		}
		ctx, cancel := context.WithCancel(n.life)
		w = &watchedNamespace{of: n, name: p.Namespace, pods: make(map[types.UID]bool), cancel: cancel, synced: make(chan struct{})}
		n.watched[p.Namespace] = w
		n.runs.Go(func() { w.watch(ctx) })
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
		w.cancel()
		delete(n.watched, p.Namespace)
	}
}

// Len returns the number of watched namespaces.
func (n *Namespaces) Len() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.watched)
}

// Shown reports whether the API has answered for every watched namespace.
func (n *Namespaces) Shown() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, w := range n.watched {
		select {
		case <-w.synced:
		default:
			return false
		}
	}
	return true
}

// Annotations returns the stored annotations of a namespace that has pods on this node. Until ctx ends,
// it waits for a namespace that the API has not shown yet. The caller must not change the map. The error
// wraps ErrNoNamespace or ErrNotShown.
func (n *Namespaces) Annotations(ctx context.Context, namespace string) (map[string]string, error) {
	n.mu.Lock()
	w := n.watched[namespace]
	n.mu.Unlock()
	if w == nil {
		return nil, fmt.Errorf("%w: %s has no pod here that the API has shown", ErrNotShown, namespace)
	}
	select {
	case <-w.synced:
	default:
		select {
		case <-w.synced:
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: %s", ErrNotShown, namespace)
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.exists {
		return nil, fmt.Errorf("%w: %s", ErrNoNamespace, namespace)
	}
	return w.annotations, nil
}

// watch follows the namespace until ctx ends. While the API server is down, the stored state remains.
func (w *watchedNamespace) watch(ctx context.Context) {
	again := wait.Backoff{Duration: firstRetry, Cap: lastRetry, Steps: math.MaxInt, Factor: 2, Jitter: 1}.DelayWithReset(clock.RealClock{}, retryReset)
	warned := false
	again.Until(ctx, true, true, func(ctx context.Context) (done bool, _ error) {
		err := w.of.api.FollowNamespace(ctx, w.name, func(annotations map[string]string, exists bool) {
			warned = false
			w.set(annotations, exists)
		})
		if err == nil || ctx.Err() != nil {
			return false, nil
		}
		level := slog.LevelWarn
		if warned { // a node has many namespaces, and an API server that is away is away for all of them
			level = slog.LevelDebug
		}
		warned = true
		w.of.log.Log(ctx, level, "watching the API server failed; trying again", "resource", "namespaces", "namespace", w.name, "error", err)
		return false, nil
	})
}

// The backoff after a watch ended, as in client-go's reflectors.
const (
	firstRetry = 800 * time.Millisecond
	lastRetry  = 30 * time.Second
	retryReset = 2 * time.Minute
)

// set stores the state of the namespace, and reports a change.
func (w *watchedNamespace) set(annotations map[string]string, exists bool) {
	var selected map[string]string
	for _, key := range w.of.keys {
		if v, ok := annotations[key]; ok {
			if selected == nil {
				selected = make(map[string]string)
			}
			selected[key] = v
		}
	}
	w.mu.Lock()
	first := !w.shown
	same := !first && w.exists == exists && maps.Equal(w.annotations, selected)
	w.shown, w.exists, w.annotations = true, exists, selected
	w.mu.Unlock()
	if first {
		close(w.synced)
	}
	if !same {
		w.of.changed(w.name)
	}
}
