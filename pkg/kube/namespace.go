package kube

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/watch"
)

// minWatch and maxWatch bound the duration of a watch. Each watch has a random one, as in
// client-go, so that not all of them end at once. A namespace changes seldom: long watches are few
// requests.
const minWatch, maxWatch = 30 * time.Minute, time.Hour

// FollowNamespace calls report with the current annotations of a namespace, and again after each
// change; exists is false if there is no such namespace. It returns nil when the API server ends
// the watch, after half an hour or more. The caller calls it again then, and after an error.
//
// One object needs neither the store nor the goroutines of a client-go Reflector, which were half
// of the memory that a pod adds to the proxy.
func (c *Client) FollowNamespace(ctx context.Context, name string, report func(annotations map[string]string, exists bool)) error {
	options := metav1.ListOptions{FieldSelector: fields.OneTermEqualSelector("metadata.name", name).String()}
	list := new(corev1.NamespaceList)
	if err := c.list("namespaces", options).Do(ctx).Into(list); err != nil {
		return fmt.Errorf("list namespace %s: %w", name, err)
	}
	if len(list.Items) == 0 {
		report(nil, false)
	} else {
		report(list.Items[0].Annotations, true)
	}

	// If the API server is gone, the health check of the HTTP/2 connection ends the watch.
	seconds := int64((minWatch + rand.N(maxWatch-minWatch)).Seconds())
	options.Watch, options.TimeoutSeconds, options.ResourceVersion = true, &seconds, list.ResourceVersion
	events, err := c.list("namespaces", options).Watch(ctx)
	if err != nil {
		return fmt.Errorf("watch namespace %s: %w", name, err)
	}
	defer events.Stop()
	for e := range events.ResultChan() {
		namespace, ok := e.Object.(*corev1.Namespace)
		if !ok {
			return fmt.Errorf("watch namespace %s: %w", name, apierrors.FromObject(e.Object))
		}
		switch e.Type {
		case watch.Added, watch.Modified:
			report(namespace.Annotations, true)
		case watch.Deleted:
			report(nil, false)
		}
	}
	return nil
}
