// Package kube makes the few requests to the Kubernetes API that the proxy needs. client-go's
// clientset links the types of every API group: half of the proxy's binary and of its resident
// pages.
package kube

import (
	"context"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
)

// Client is a client of the core API group. Its errors are those of
// k8s.io/apimachinery/pkg/api/errors.
type Client struct{ core *rest.RESTClient }

var (
	scheme         = runtime.NewScheme()
	codecs         = serializer.NewCodecFactory(scheme)
	parameterCodec = runtime.NewParameterCodec(scheme)
)

func init() { utilruntime.Must(corev1.AddToScheme(scheme)) }

// New returns a client with a copy of the configuration.
func New(config *rest.Config) (*Client, error) {
	c := rest.CopyConfig(config)
	c.APIPath, c.GroupVersion = "/api", &corev1.SchemeGroupVersion
	c.NegotiatedSerializer = codecs.WithoutConversion()
	core, err := rest.RESTClientFor(c)
	if err != nil {
		return nil, fmt.Errorf("kubernetes client: %w", err)
	}
	return &Client{core}, nil
}

// CloseIdleConnections closes the connections without a request in progress.
func (c *Client) CloseIdleConnections() { c.core.Client.CloseIdleConnections() }

// ListPods lists the pods of all namespaces.
func (c *Client) ListPods(ctx context.Context, o metav1.ListOptions) (*corev1.PodList, error) {
	pods := new(corev1.PodList)
	return pods, c.list("pods", o).Do(ctx).Into(pods)
}

// WatchPods watches the pods of all namespaces.
func (c *Client) WatchPods(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
	o.Watch = true
	return c.list("pods", o).Watch(ctx)
}

// GetPod gets one pod.
func (c *Client) GetPod(ctx context.Context, namespace, name string) (*corev1.Pod, error) {
	pod := new(corev1.Pod)
	return pod, c.core.Get().Namespace(namespace).Resource("pods").Name(name).Do(ctx).Into(pod)
}

// CreateEvent creates an Event in its namespace.
func (c *Client) CreateEvent(ctx context.Context, e *corev1.Event) (*corev1.Event, error) {
	created := new(corev1.Event)
	return created, c.core.Post().Namespace(e.Namespace).Resource("events").Body(e).Do(ctx).Into(created)
}

// PatchEvent changes an Event by a strategic merge patch.
func (c *Client) PatchEvent(ctx context.Context, e *corev1.Event, patch []byte) (*corev1.Event, error) {
	patched := new(corev1.Event)
	return patched, c.core.Patch(types.StrategicMergePatchType).Namespace(e.Namespace).Resource("events").Name(e.Name).Body(patch).Do(ctx).Into(patched)
}

// list returns the request for a list or a watch of a resource in all namespaces.
func (c *Client) list(resource string, o metav1.ListOptions) *rest.Request {
	r := c.core.Get().Resource(resource).VersionedParams(&o, parameterCodec)
	if o.TimeoutSeconds != nil {
		r.Timeout(time.Duration(*o.TimeoutSeconds) * time.Second)
	}
	return r
}
