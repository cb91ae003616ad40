package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/rest"
)

// A watch of one object that seldom changes: longer ones are fewer requests. Each ends at its own time, as client-go's do.
const minWatch, maxWatch = 30 * time.Minute, time.Hour

// metadata is what is read of a namespace, and of a list the version.
type metadata struct {
	ResourceVersion string
	Annotations     map[string]string
}

// FollowNamespace calls tell with the annotations of a namespace as they are now, and again whenever the API says that something of
// it changed; with exists false where there is no such namespace. It returns nil when the API server ends the watch in time, which is
// after half an hour or more, and is to be called again then, as after an error.
//
// A Reflector of client-go would do this with four goroutines for each namespace, whose stacks were half of what a pod adds to the
// proxy's memory. One object needs no store, and listing it again costs as little as to go on where a watch ended.
func (c *Client) FollowNamespace(ctx context.Context, name string, tell func(annotations map[string]string, exists bool)) error {
	selector := fields.OneTermEqualSelector("metadata.name", name).String()
	text, err := c.namespaces(metav1.ListOptions{FieldSelector: selector}).DoRaw(ctx)
	if err != nil {
		return fmt.Errorf("list namespace %s: %w", name, err)
	}
	var list struct {
		Metadata metadata
		Items    []struct{ Metadata metadata }
	}
	if err := json.Unmarshal(text, &list); err != nil {
		return fmt.Errorf("list namespace %s: %w", name, err)
	}
	if len(list.Items) == 0 {
		tell(nil, false)
	} else {
		tell(list.Items[0].Metadata.Annotations, true)
	}

	lasts := minWatch + rand.N(maxWatch-minWatch)
	seconds := int64(lasts.Seconds())
	// The API server ends the watch, and hears of nothing else where it is gone: what ends it then is the connection's own health check.
	stream, err := c.namespaces(metav1.ListOptions{
		FieldSelector: selector, Watch: true, TimeoutSeconds: &seconds, ResourceVersion: list.Metadata.ResourceVersion,
	}).Stream(ctx)
	if err != nil {
		return fmt.Errorf("watch namespace %s: %w", name, err)
	}
	defer stream.Close()
	for events := json.NewDecoder(stream); ; {
		var event struct {
			Type   string
			Object json.RawMessage
		}
		if err := events.Decode(&event); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("watch namespace %s: %w", name, err)
		}
		switch event.Type {
		case "ADDED", "MODIFIED":
			var namespace struct{ Metadata metadata }
			if err := json.Unmarshal(event.Object, &namespace); err != nil {
				return fmt.Errorf("watch namespace %s: %w", name, err)
			}
			tell(namespace.Metadata.Annotations, true)
		case "DELETED":
			tell(nil, false)
		case "ERROR":
			var status metav1.Status
			if err := json.Unmarshal(event.Object, &status); err != nil {
				return fmt.Errorf("watch namespace %s: %w", name, err)
			}
			return fmt.Errorf("watch namespace %s: %w", name, &apierrors.StatusError{ErrStatus: status})
		}
	}
}

func (c *Client) namespaces(o metav1.ListOptions) *rest.Request {
	return c.core.Get().Resource("namespaces").VersionedParams(&o, parameterCodec)
}
