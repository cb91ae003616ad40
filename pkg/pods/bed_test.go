package pods

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/kube"
	"github.com/kube2iam-cni/kube2iam-cni/test/kubeapi"
	"github.com/kube2iam-cni/kube2iam-cni/test/testrecord"
)

const (
	thisNode = "node-1"
	roleKey  = "iam.amazonaws.com/role"
)

var (
	ipA = netip.MustParseAddr("10.244.0.5")
	ipB = netip.MustParseAddr("10.244.0.6")
)

// bed is an API server, a state directory, and a resolver over both.
type bed struct {
	t        *testing.T
	api      *kubeapi.Server
	dir      attachment.Dir
	watch    *Watch
	resolver *Resolver
	events   *recorder
}

type recorder struct {
	mu      sync.Mutex
	changed map[string]int
	gone    map[string]int
}

func (r *recorder) PodChanged(p *Pod) { r.mu.Lock(); r.changed[p.Name]++; r.mu.Unlock() }
func (r *recorder) PodGone(p *Pod)    { r.mu.Lock(); r.gone[p.Name]++; r.mu.Unlock() }

func newBed(t *testing.T, change func(*ResolverConfig)) *bed {
	t.Helper()
	api, err := kubeapi.Start(kubeapi.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(api.Close)
	client, err := kube.New(&rest.Config{Host: api.URL(), QPS: -1})
	if err != nil {
		t.Fatal(err)
	}
	keep := func(key string) bool { return key == roleKey }
	b := &bed{t: t, api: api, dir: attachment.In(t.TempDir()), events: &recorder{changed: map[string]int{}, gone: map[string]int{}}}
	b.watch, err = NewWatch(WatchConfig{API: client, Node: thisNode, Keep: keep, Watcher: b.events, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	c := ResolverConfig{Records: attachment.NewIndex(b.dir), Watch: b.watch, API: client, Node: thisNode, Keep: keep}
	if change != nil {
		change(&c)
	}
	b.resolver = NewResolver(c)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- b.watch.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	<-b.watch.Synced()
	return b
}

// eventually waits until the watch has caught up with what the test changed.
func (b *bed) eventually(what string, holds func() bool) {
	b.t.Helper()
	deadline := time.After(20 * time.Second)
	for {
		changed := b.watch.change()
		if holds() {
			return
		}
		select {
		case <-changed:
		case <-deadline:
			b.t.Fatalf("%s: never", what)
		}
	}
}

func (b *bed) seen(p *corev1.Pod) *corev1.Pod {
	b.t.Helper()
	b.eventually("the watch shows "+p.Name, func() bool {
		k := b.known(p.UID)
		return k != nil && k.ResourceVersion == p.ResourceVersion
	})
	return p
}

func (b *bed) known(uid types.UID) *Pod {
	b.watch.mu.RLock()
	defer b.watch.mu.RUnlock()
	return b.watch.byUID[uid]
}

func (b *bed) running(name string, ips ...string) *corev1.Pod {
	return b.seen(b.api.PutPod(kubeapi.NewRunningPod(thisNode, "ns", name, map[string]string{roleKey: name}, ips...)))
}

func (b *bed) pending(name string) *corev1.Pod {
	return b.seen(b.api.PutPod(kubeapi.NewPod(thisNode, "ns", name, map[string]string{roleKey: name})))
}

func (b *bed) record(ip netip.Addr, container string, pod attachment.Pod) {
	b.t.Helper()
	err := b.dir.Put(testrecord.New(container, pod, ip))
	if err != nil {
		b.t.Fatal(err)
	}
}

func of(p *corev1.Pod) attachment.Pod {
	return attachment.Pod{Namespace: p.Namespace, Name: p.Name, UID: string(p.UID)}
}

func (b *bed) want(ip netip.Addr, name string) {
	b.t.Helper()
	p, err := b.resolver.Resolve(b.t.Context(), b.resolver.Source(ip))
	if err != nil || p.Name != name {
		b.t.Errorf("%s: %v, %v; want %s", ip, p, err, name)
	}
}

func (b *bed) refused(ip netip.Addr, want error) {
	b.t.Helper()
	if p, err := b.resolver.Resolve(b.t.Context(), b.resolver.Source(ip)); !errors.Is(err, want) {
		b.t.Errorf("%s: %v, %v; want %v", ip, p, err, want)
	}
}

// recordOfA returns an index of one record: the pod a, with the UID a, holds ipA.
func recordOfA(t *testing.T) *attachment.Index {
	t.Helper()
	dir := attachment.In(t.TempDir())
	if err := dir.Put(testrecord.New("c", attachment.Pod{Namespace: "ns", Name: "a", UID: "a"}, ipA)); err != nil {
		t.Fatal(err)
	}
	return attachment.NewIndex(dir)
}
