package main

import (
	"context"
	"fmt"
	"log/slog"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/credentials"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
)

// countingSTS returns credentials for an hour and counts the calls. It denies the role "denied".
type countingSTS struct{ calls atomic.Int64 }

func (s *countingSTS) AssumeRole(_ context.Context, a roles.Assumption) (*credentials.Credentials, error) {
	n := s.calls.Add(1)
	if a.RoleName() == "denied" {
		return nil, &credentials.Error{Kind: credentials.Denied, Code: "AccessDenied"}
	}
	return &credentials.Credentials{AccessKeyID: fmt.Sprint("ASIA", n), SecretAccessKey: "secret", SessionToken: "token",
		Obtained: time.Now(), Expiration: time.Now().Add(time.Hour)}, nil
}

// startComponents runs the proxy's components until end is called.
func startComponents(t *testing.T, client kubeAPI, change func(*options)) (p *components, records attachment.Dir, end func()) {
	t.Helper()
	o := &options{node: "node-1", rules: roles.Rules{RoleKey: roleKey, BaseARN: "arn:aws:iam::123456789012:role/", Duration: time.Hour}}
	if change != nil {
		change(o)
	}
	p, dir, end := startComponentsWith(t, client, o)
	return p, attachment.In(dir), end
}

// startComponentsIn also returns the state directory.
func startComponentsIn(t *testing.T, client kubeAPI) (p *components, stateDir string, end func()) {
	t.Helper()
	return startComponentsWith(t, client, &options{node: "node-1", rules: roles.Rules{RoleKey: roleKey, BaseARN: "arn:aws:iam::123456789012:role/", Duration: time.Hour}})
}

func startComponentsWith(t *testing.T, client kubeAPI, o *options) (p *components, stateDir string, end func()) {
	t.Helper()
	stateDir = t.TempDir()
	p = newComponents(o, client, new(countingSTS), attachment.NewIndex(attachment.In(stateDir)), slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- p.run(ctx, func(ctx context.Context) error { <-ctx.Done(); return nil })
	}()
	return p, stateDir, func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// fakeAPI is client-go's fake clientset. It works without sockets, and so with synctest.
type fakeAPI struct{ *fake.Clientset }

func (f fakeAPI) ListPods(ctx context.Context, o metav1.ListOptions) (*corev1.PodList, error) {
	return f.CoreV1().Pods("").List(ctx, o)
}

func (f fakeAPI) WatchPods(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
	return f.CoreV1().Pods("").Watch(ctx, o)
}

func (f fakeAPI) GetPod(ctx context.Context, namespace, name string) (*corev1.Pod, error) {
	return f.CoreV1().Pods(namespace).Get(ctx, name, metav1.GetOptions{})
}

func (f fakeAPI) FollowNamespace(ctx context.Context, _ string, _ func(map[string]string, bool)) error {
	<-ctx.Done() // nothing is restricted
	return nil
}

func (f fakeAPI) CreateEvent(ctx context.Context, e *corev1.Event) (*corev1.Event, error) {
	return f.CoreV1().Events(e.Namespace).Create(ctx, e, metav1.CreateOptions{})
}

func (f fakeAPI) PatchEvent(ctx context.Context, e *corev1.Event, patch []byte) (*corev1.Event, error) {
	return f.CoreV1().Events(e.Namespace).Patch(ctx, e.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{})
}
