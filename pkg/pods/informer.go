package pods

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
)

// selection is what one informer watches.
type selection struct {
	resource string
	of       runtime.Object
	fields   fields.Selector
	// strip makes what is kept of an object.
	strip  cache.TransformFunc
	resync time.Duration
}

// newInformer is an informer that begins with runInformer.
func newInformer(client kubernetes.Interface, s selection, log *slog.Logger) (cache.SharedIndexInformer, error) {
	lw := cache.NewListWatchFromClient(client.CoreV1().RESTClient(), s.resource, "", s.fields)
	informer := cache.NewSharedIndexInformer(cache.ToListWatcherWithWatchListSemantics(lw, client), s.of, s.resync, cache.Indexers{})
	if err := informer.SetTransform(s.strip); err != nil {
		return nil, err
	}
	err := informer.SetWatchErrorHandlerWithContext(func(ctx context.Context, _ *cache.Reflector, err error) {
		if ctx.Err() == nil {
			log.Warn("watching the API server failed; trying again", "resource", s.resource, "error", err)
		}
	})
	return informer, err
}

// runInformer watches until ctx ends, and closes synced once the handler has seen all that was there at the start.
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

// lastKnown is the object of an event, also where the watch missed its end.
func lastKnown(obj any) any {
	if d, ok := obj.(cache.DeletedFinalStateUnknown); ok {
		return d.Obj
	}
	return obj
}
