package pods

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
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

// harness is an API server, a state directory, and a resolver over both.
type harness struct {
	t        *testing.T
	api      *kubeapi.Server
	dir      string
	watch    *Watch
	resolver *Resolver
	watcher  *countingWatcher
}

// countingWatcher counts the calls for each pod.
type countingWatcher struct {
	mu      sync.Mutex
	changed map[string]int
	gone    map[string]int
}

func (w *countingWatcher) PodChanged(p *Pod) { w.mu.Lock(); w.changed[p.Name]++; w.mu.Unlock() }
func (w *countingWatcher) PodGone(p *Pod)    { w.mu.Lock(); w.gone[p.Name]++; w.mu.Unlock() }

// startAPI starts an API server that ends with the test, and returns a client of it.
func startAPI(t *testing.T) (*kubeapi.Server, *kube.Client) {
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
	return api, client
}

func newHarness(t *testing.T, change func(*ResolverConfig)) *harness {
	t.Helper()
	api, client := startAPI(t)
	h := &harness{t: t, api: api, dir: t.TempDir(), watcher: &countingWatcher{changed: map[string]int{}, gone: map[string]int{}}}
	h.watch = NewWatch(WatchConfig{API: client, Node: thisNode, Keep: func(key string) bool { return key == roleKey }, Watcher: h.watcher})
	c := ResolverConfig{Records: attachment.NewIndex(attachment.In(h.dir)), Watch: h.watch}
	if change != nil {
		change(&c)
	}
	h.resolver = NewResolver(c)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- h.watch.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	<-h.watch.Synced()
	return h
}

// eventually waits until the watch has received what the test changed.
func (h *harness) eventually(what string, holds func() bool) {
	h.t.Helper()
	deadline := time.After(20 * time.Second)
	for {
		changed := h.watch.change()
		if holds() {
			return
		}
		select {
		case <-changed:
		case <-deadline:
			h.t.Fatalf("%s: never", what)
		}
	}
}

// put stores a pod in the API, and waits until the watch shows it.
func (h *harness) put(p *corev1.Pod) *corev1.Pod {
	h.t.Helper()
	p = h.api.PutPod(p)
	h.shows(p)
	return p
}

func (h *harness) shows(p *corev1.Pod) {
	h.t.Helper()
	h.eventually("the watch shows "+p.Name, func() bool {
		k := h.stored(p.UID)
		return k != nil && k.ResourceVersion == p.ResourceVersion
	})
}

// stored returns the pod that the watch has stored, or nil.
func (h *harness) stored(uid types.UID) *Pod {
	if pods := h.watch.indexed(uidIndex, string(uid)); len(pods) > 0 {
		return pods[0]
	}
	return nil
}

func (h *harness) running(name string, ips ...string) *corev1.Pod {
	h.t.Helper()
	return h.put(kubeapi.NewRunningPod(thisNode, "ns", name, map[string]string{roleKey: name}, ips...))
}

func (h *harness) pending(name string) *corev1.Pod {
	h.t.Helper()
	return h.put(kubeapi.NewPod(thisNode, "ns", name, map[string]string{roleKey: name}))
}

func (h *harness) record(ip netip.Addr, container string, pod attachment.Pod) {
	h.t.Helper()
	putRecord(h.t, h.dir, container, pod, ip)
}

func (h *harness) resolvesTo(ip netip.Addr, name string) {
	h.t.Helper()
	p, err := h.resolver.Resolve(h.t.Context(), h.resolver.Source(ip))
	if err != nil || p.Name != name {
		h.t.Errorf("%s: %v, %v; want %s", ip, p, err, name)
	}
}

func (h *harness) refuses(ip netip.Addr, want error) {
	h.t.Helper()
	if p, err := h.resolver.Resolve(h.t.Context(), h.resolver.Source(ip)); !errors.Is(err, want) {
		h.t.Errorf("%s: %v, %v; want %v", ip, p, err, want)
	}
}

func putRecord(t *testing.T, dir, container string, pod attachment.Pod, ips ...netip.Addr) {
	t.Helper()
	if err := attachment.In(dir).Put(testrecord.New(container, pod, ips...)); err != nil {
		t.Fatal(err)
	}
}

// recordOf returns the fields of a record that name the pod.
func recordOf(p *corev1.Pod) attachment.Pod {
	return attachment.Pod{Namespace: p.Namespace, Name: p.Name, UID: string(p.UID)}
}

// putUnreadableRecord replaces the record of an address by a file that cannot be read.
func putUnreadableRecord(t *testing.T, dir string, ip netip.Addr) {
	t.Helper()
	path := filepath.Join(dir, "by-ip", ip.String())
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("{"), 0o644); err != nil {
		t.Fatal(err)
	}
}

// recordOfA returns an index of one record: the pod a, with the UID a, holds ipA.
func recordOfA(t *testing.T) *attachment.Index {
	t.Helper()
	dir := t.TempDir()
	putRecord(t, dir, "c", attachment.Pod{Namespace: "ns", Name: "a", UID: "a"}, ipA)
	return attachment.NewIndex(attachment.In(dir))
}

func noRecords(t *testing.T) *attachment.Index {
	return attachment.NewIndex(attachment.In(t.TempDir()))
}

// hangingAPI is an API server that does not answer, and counts the requests.
type hangingAPI struct {
	gets, follows atomic.Int64
	longest       atomic.Int64 // the longest wait of a request, in nanoseconds
	fails         bool         // it answers with an error at once

	mu       sync.Mutex
	getsByID map[string]int // by the pod's name
}

func (a *hangingAPI) hang(ctx context.Context) error {
	if a.fails {
		return errors.New("no")
	}
	start := time.Now()
	<-ctx.Done()
	a.longest.Store(max(a.longest.Load(), int64(time.Since(start))))
	return ctx.Err()
}

func (a *hangingAPI) ListPods(ctx context.Context, _ metav1.ListOptions) (*corev1.PodList, error) {
	return nil, a.hang(ctx)
}

func (a *hangingAPI) WatchPods(ctx context.Context, _ metav1.ListOptions) (watch.Interface, error) {
	return nil, a.hang(ctx)
}

func (a *hangingAPI) GetPod(ctx context.Context, _, name string) (*corev1.Pod, error) {
	a.gets.Add(1)
	a.mu.Lock()
	if a.getsByID == nil {
		a.getsByID = make(map[string]int)
	}
	a.getsByID[name]++
	a.mu.Unlock()
	return nil, a.hang(ctx)
}

// getsOf returns how often a pod was requested.
func (a *hangingAPI) getsOf(name string) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.getsByID[name]
}

func (a *hangingAPI) FollowNamespace(ctx context.Context, _ string, _ func(map[string]string, bool)) error {
	a.follows.Add(1)
	return a.hang(ctx)
}

// answeringAPI is an API server that answers requests for single pods.
type answeringAPI struct {
	hangingAPI
	pods map[string]*corev1.Pod // by name
}

func (a *answeringAPI) GetPod(_ context.Context, _, name string) (*corev1.Pod, error) {
	a.gets.Add(1)
	if p := a.pods[name]; p != nil {
		return p, nil
	}
	return nil, apierrors.NewNotFound(corev1.Resource("pods"), name)
}

// syncedWatch returns a watch that has stored these pods and receives no changes.
func syncedWatch(api API, pods ...*Pod) *Watch {
	w := unsyncedWatch(api, pods...)
	w.sync()
	return w
}

// unsyncedWatch returns a watch that has stored these pods and has not received the whole list.
func unsyncedWatch(api API, pods ...*Pod) *Watch {
	w := NewWatch(WatchConfig{API: api, Node: thisNode, Keep: func(string) bool { return true }})
	w.synced = make(chan struct{})
	for _, p := range pods {
		w.put(p)
	}
	return w
}

func (w *Watch) sync() {
	synced := make(chan struct{})
	close(synced)
	w.synced = synced
}

// put and remove change the stored pods, as a watch of the API does.
func (w *Watch) put(p *Pod) {
	if err := w.pods.Add(p); err != nil {
		panic(err)
	}
	w.notify()
}

func (w *Watch) remove(p *Pod) {
	if err := w.pods.Delete(p); err != nil {
		panic(err)
	}
	w.notify()
}

// reporter returns a pod that reports addresses. Its UID is its name.
func reporter(name string, ips ...netip.Addr) *Pod {
	return &Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name, UID: types.UID(name)}, Node: thisNode, IPs: ips}
}
