package pods

import (
	"context"
	"sync"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
)

// API is the part of the Kubernetes API that this package uses. kube.Client implements it.
type API interface {
	ListPods(ctx context.Context, o metav1.ListOptions) (*corev1.PodList, error)
	WatchPods(ctx context.Context, o metav1.ListOptions) (watch.Interface, error)
	GetPod(ctx context.Context, namespace, name string) (*corev1.Pod, error)
	FollowNamespace(ctx context.Context, name string, tell func(annotations map[string]string, exists bool)) error
}

// podsOf returns a ListerWatcher of a node's pods.
func podsOf(node string, api API) cache.ListerWatcher {
	selector := fields.OneTermEqualSelector("spec.nodeName", node).String()
	return cache.ToListWatcherWithWatchListSemantics(&cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			o.FieldSelector = selector
			return api.ListPods(ctx, o)
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			o.FieldSelector = selector
			return api.WatchPods(ctx, o)
		},
	}, api)
}

// runInformer watches until ctx ends. It closes synced when the handler has received the initial list.
func runInformer(ctx context.Context, informer cache.SharedIndexInformer, handler cache.ResourceEventHandler, synced chan<- struct{}) error {
	registration, err := informer.AddEventHandler(handler)
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		if cache.WaitForCacheSync(ctx.Done(), registration.HasSynced) {
			close(synced)
		}
	})
	informer.RunWithContext(ctx)
	return nil
}

// lastKnown returns the object of a deletion, including one that the watch missed.
func lastKnown(obj any) any {
	if d, ok := obj.(cache.DeletedFinalStateUnknown); ok {
		return d.Obj
	}
	return obj
}
