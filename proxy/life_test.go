package main

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/client-go/rest"
	clienttesting "k8s.io/client-go/testing"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/credentials"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/kube"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
	"github.com/kube2iam-cni/kube2iam-cni/test/kubeapi"
)

const roleKey = "iam.amazonaws.com/role"

// countingSTS gives credentials for an hour, and counts.
type countingSTS struct{ calls atomic.Int64 }

func (s *countingSTS) AssumeRole(context.Context, roles.Assumption) (*credentials.Credentials, error) {
	n := s.calls.Add(1)
	return &credentials.Credentials{AccessKeyID: fmt.Sprint("ASIA", n), SecretAccessKey: "secret", SessionToken: "token",
		Obtained: time.Now(), Expiration: time.Now().Add(time.Hour)}, nil
}

// lives is the proxy's parts, joined and running until the test calls end.
func lives(t *testing.T, client cluster, change func(*options)) (p *parts, records attachment.Dir, end func()) {
	t.Helper()
	o := &options{node: "node-1", rules: roles.Rules{RoleKey: roleKey, BaseARN: "arn:aws:iam::123456789012:role/", Duration: time.Hour}}
	if change != nil {
		change(o)
	}
	records = attachment.In(t.TempDir())
	p, err := assemble(o, client, new(countingSTS), attachment.NewIndex(records), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- live(ctx, p, func(ctx context.Context) error { <-ctx.Done(); return nil })
	}()
	return p, records, func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// faked is client-go's fake, which has no sockets.
type faked struct{ *fake.Clientset }

func (f faked) ListPods(ctx context.Context, o metav1.ListOptions) (*corev1.PodList, error) {
	return f.CoreV1().Pods("").List(ctx, o)
}

func (f faked) WatchPods(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
	return f.CoreV1().Pods("").Watch(ctx, o)
}

func (f faked) GetPod(ctx context.Context, namespace, name string) (*corev1.Pod, error) {
	return f.CoreV1().Pods(namespace).Get(ctx, name, metav1.GetOptions{})
}

func (f faked) FollowNamespace(ctx context.Context, _ string, _ func(map[string]string, bool)) error {
	<-ctx.Done() // nothing is restricted
	return nil
}

func (f faked) CreateEvent(ctx context.Context, e *corev1.Event) (*corev1.Event, error) {
	return f.CoreV1().Events(e.Namespace).Create(ctx, e, metav1.CreateOptions{})
}

func (f faked) PatchEvent(ctx context.Context, e *corev1.Event, patch []byte) (*corev1.Event, error) {
	return f.CoreV1().Events(e.Namespace).Patch(ctx, e.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{})
}

// TestKnownPodsAreServedWhileTheAPIServerIsAway has it away for an hour, in which credentials are renewed.
func TestKnownPodsAreServedWhileTheAPIServerIsAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := fake.NewClientset(&corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "pod", UID: "uid", Annotations: map[string]string{roleKey: "reader"}},
			Spec:       corev1.PodSpec{NodeName: "node-1"},
			Status:     corev1.PodStatus{Phase: corev1.PodRunning, PodIP: "10.0.0.1"},
		})
		var away atomic.Bool
		var refused atomic.Int64
		var mu sync.Mutex
		var watches []watch.Interface
		client.PrependReactor("*", "*", func(clienttesting.Action) (bool, runtime.Object, error) {
			if !away.Load() {
				return false, nil, nil
			}
			refused.Add(1)
			return true, nil, apierrors.NewServiceUnavailable("away")
		})
		client.PrependWatchReactor("*", func(a clienttesting.Action) (bool, watch.Interface, error) {
			if away.Load() {
				refused.Add(1)
				return true, nil, apierrors.NewServiceUnavailable("away")
			}
			w, err := client.Tracker().Watch(a.GetResource(), a.GetNamespace())
			mu.Lock()
			defer mu.Unlock()
			watches = append(watches, w)
			return true, w, err
		})
		p, _, end := lives(t, faked{client}, nil)
		defer end()
		<-p.watch.Synced()

		ask := func(ctx context.Context) error {
			d, err := p.broker.Caller(netip.MustParseAddr("10.0.0.1"), time.Now()).Credentials(ctx, "reader")
			if err == nil && time.Until(d.Expiration()) < 1500*time.Second {
				err = fmt.Errorf("%v left", time.Until(d.Expiration()))
			}
			return err
		}
		if err := ask(t.Context()); err != nil {
			t.Fatal(err)
		}
		away.Store(true)
		mu.Lock()
		for _, w := range watches {
			w.Stop()
		}
		mu.Unlock()
		for minute := range 60 {
			time.Sleep(time.Minute)
			soon, cancel := context.WithTimeout(t.Context(), time.Second)
			if err := ask(soon); err != nil {
				t.Fatalf("after %d minutes: %v", minute+1, err)
			}
			cancel()
		}
		if refused.Load() < 60 {
			t.Errorf("the API server was asked %d times: was it away?", refused.Load())
		}
	})
}

// TestThousandPodsLeaveNothing has pods come and go in any order, be asked for and change, with and without records.
func TestThousandPodsLeaveNothing(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	seed := uint64(time.Now().UnixNano())
	chance := rand.New(rand.NewPCG(seed, 1))
	t.Logf("seed %d", seed)
	api, err := kubeapi.Start(kubeapi.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer api.Close()
	client, err := kube.New(&rest.Config{Host: api.URL(), QPS: -1})
	if err != nil {
		t.Fatal(err)
	}
	defer client.CloseIdleConnections()
	p, records, end := lives(t, client, func(o *options) {
		o.rules.Restriction = &roles.Restriction{Key: "allowed", Format: roles.Glob}
		o.rules.DefaultRole = "default"
	})
	ended := sync.OnceFunc(end)
	defer ended()
	for i := range 20 {
		api.PutNamespace(fmt.Sprint("ns-", i), map[string]string{"allowed": `["role-*"]`})
	}

	type pod struct {
		*corev1.Pod
		ip netip.Addr
	}
	var alive []pod
	address := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, byte(i / 250), byte(i%250 + 1)}) }
	remove := func(i int) {
		gone := alive[i]
		alive = append(alive[:i], alive[i+1:]...)
		if err := records.Delete(t.Context(), string(gone.UID), "eth0"); err != nil {
			t.Fatal(err)
		}
		if err := api.DeletePod(gone.Namespace, gone.Name); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 1000 {
		created := kubeapi.NewPod("node-1", fmt.Sprint("ns-", chance.IntN(20)), fmt.Sprint("pod-", i), map[string]string{roleKey: fmt.Sprint("role-", chance.IntN(50))})
		switch chance.IntN(10) {
		case 0:
			created.Annotations = nil
		case 1:
			created.Annotations[roleKey] = "no role"
		case 2:
			created.Annotations[roleKey] = "forbidden"
		}
		new := pod{api.PutPod(created), address(i)}
		alive = append(alive, new)
		if chance.IntN(2) == 0 {
			err := records.Put(t.Context(), &attachment.Record{ContainerID: string(new.UID), IfName: "eth0", Network: "net", IPs: []netip.Addr{new.ip},
				Pod: attachment.Pod{Namespace: new.Namespace, Name: new.Name, UID: string(new.UID)}, Path: attachment.PathRouted})
			if err != nil {
				t.Fatal(err)
			}
		}
		phase := corev1.PodRunning
		if chance.IntN(20) == 0 {
			phase = corev1.PodSucceeded
		}
		if err := api.SetStatus(new.Namespace, new.Name, phase, new.ip.String()); err != nil {
			t.Fatal(err)
		}
		if asks := alive[chance.IntN(len(alive))]; chance.IntN(3) == 0 {
			soon, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			role := strings.TrimPrefix(asks.Annotations[roleKey], "/")
			p.broker.Caller(asks.ip, time.Now()).Credentials(soon, role)
			cancel()
		}
		if chance.IntN(10) == 0 {
			api.PutNamespace(fmt.Sprint("ns-", chance.IntN(20)), map[string]string{"allowed": fmt.Sprintf(`["role-%d*"]`, chance.IntN(5))})
		}
		for len(alive) > 100 || len(alive) > 0 && chance.IntN(3) == 0 {
			remove(chance.IntN(len(alive)))
		}
	}
	for len(alive) > 0 {
		remove(0)
	}
	left := func() string {
		return fmt.Sprintf("%d pods, %d decisions, %d namespaces, %d holders", p.watch.Len(), len(p.broker.Assignments()), p.namespaces.Len(), p.cache.Holders())
	}
	const nothing = "0 pods, 0 decisions, 0 namespaces, 0 holders"
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(30 * time.Second)
	for left() != nothing {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("left: %s", left())
		}
	}
	ended()
}
