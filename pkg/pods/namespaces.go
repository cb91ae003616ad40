package pods

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
)

// ErrNoNamespace is the error of a namespace that the API has not shown.
var ErrNoNamespace = errors.New("the namespace is not known")

// Namespaces keeps the annotations of namespaces.
type Namespaces struct {
	informer cache.SharedIndexInformer
	synced   chan struct{}
	changed  func(namespace string)
}

// NamespacesConfig is what Namespaces depends on.
type NamespacesConfig struct {
	Client kubernetes.Interface
	// Key is the one annotation that is kept.
	Key string
	// Resync is how often every namespace is looked at again without a change; zero for never.
	Resync time.Duration
	// Changed is called with the name of each namespace that changed; it must not block.
	Changed func(namespace string)
	Log     *slog.Logger
}

// NewNamespaces is a watch of the namespaces that begins with Run.
func NewNamespaces(c NamespacesConfig) (*Namespaces, error) {
	informer, err := newInformer(c.Client, selection{
		resource: "namespaces", of: &corev1.Namespace{}, resync: c.Resync, fields: fields.Everything(),
		strip: func(obj any) (any, error) {
			ns, ok := obj.(*corev1.Namespace)
			if !ok {
				return obj, nil
			}
			kept := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: ns.Name, UID: ns.UID, ResourceVersion: ns.ResourceVersion}}
			if v, ok := ns.Annotations[c.Key]; ok {
				kept.Annotations = map[string]string{c.Key: v}
			}
			return kept, nil
		},
	}, c.Log)
	if err != nil {
		return nil, err
	}
	return &Namespaces{informer: informer, synced: make(chan struct{}), changed: c.Changed}, nil
}

// Synced is closed once the namespaces that were there at the start are known.
func (n *Namespaces) Synced() <-chan struct{} { return n.synced }

// Run watches until ctx ends.
func (n *Namespaces) Run(ctx context.Context) error {
	tell := func(obj any) {
		if ns, ok := lastKnown(obj).(*corev1.Namespace); ok && n.changed != nil {
			n.changed(ns.Name)
		}
	}
	return runInformer(ctx, n.informer, cache.ResourceEventHandlerFuncs{
		AddFunc: tell, UpdateFunc: func(_, obj any) { tell(obj) }, DeleteFunc: tell,
	}, n.synced)
}

// Annotations is what is kept of the namespace's annotations. The map must not be changed. The error wraps ErrNoNamespace.
func (n *Namespaces) Annotations(namespace string) (map[string]string, error) {
	obj, ok, err := n.informer.GetStore().GetByKey(namespace)
	if err != nil || !ok {
		return nil, fmt.Errorf("%w: %s", ErrNoNamespace, namespace)
	}
	return obj.(*corev1.Namespace).Annotations, nil
}
