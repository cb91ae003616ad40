package pods

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/test/testrecord"
)

// hanging is an API server that answers nothing, and counts what it is asked.
type hanging struct {
	gets, lists, follows atomic.Int64
	waited               atomic.Int64 // the longest that one question waited, in nanoseconds
	fails                bool         // it answers with an error, at once

	mu   sync.Mutex
	pods map[string]int // gets by the pod's name
}

func (h *hanging) hang(ctx context.Context) error {
	if h.fails {
		return errors.New("no")
	}
	start := time.Now()
	<-ctx.Done()
	h.waited.Store(max(h.waited.Load(), int64(time.Since(start))))
	return ctx.Err()
}

func (h *hanging) ListPods(ctx context.Context, _ metav1.ListOptions) (*corev1.PodList, error) {
	h.lists.Add(1)
	return nil, h.hang(ctx)
}

func (h *hanging) WatchPods(ctx context.Context, _ metav1.ListOptions) (watch.Interface, error) {
	return nil, h.hang(ctx)
}

func (h *hanging) GetPod(ctx context.Context, _, name string) (*corev1.Pod, error) {
	h.gets.Add(1)
	h.mu.Lock()
	if h.pods == nil {
		h.pods = make(map[string]int)
	}
	h.pods[name]++
	h.mu.Unlock()
	return nil, h.hang(ctx)
}

func (h *hanging) FollowNamespace(ctx context.Context, _ string, _ func(map[string]string, bool)) error {
	h.follows.Add(1)
	return h.hang(ctx)
}

// synced is a watch that has shown these pods, and shows nothing more.
func synced(t *testing.T, api API, pods ...*Pod) *Watch {
	t.Helper()
	w, err := NewWatch(WatchConfig{API: api, Node: thisNode, Keep: func(string) bool { return true }, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	close(w.synced)
	for _, p := range pods {
		w.replace(p.UID, p)
	}
	return w
}

func reporting(uid string, ips ...netip.Addr) *Pod {
	return &Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: uid, UID: types.UID(uid)}, Node: thisNode, IPs: ips}
}

// atOnce resolves each address again and again, for ten seconds.
func atOnce(r *Resolver, ips ...netip.Addr) {
	var wg sync.WaitGroup
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); {
		for _, ip := range ips {
			wg.Go(func() {
				ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
				defer cancel()
				r.Resolve(ctx, r.Source(ip))
			})
		}
		time.Sleep(500 * time.Millisecond)
	}
	wg.Wait()
}

// TestRequestsCannotFloodTheAPIServer has many pods ask at once whose addresses do not become known.
func TestRequestsCannotFloodTheAPIServer(t *testing.T) {
	dir := attachment.In(t.TempDir())
	var ips []netip.Addr
	for i := range 40 {
		ip := netip.AddrFrom4([4]byte{10, 0, 1, byte(i)})
		ips = append(ips, ip)
		record := testrecord.New(fmt.Sprint("c", i), attachment.Pod{Namespace: "ns", Name: fmt.Sprint("pod-", i), UID: fmt.Sprint("uid-", i)}, ip)
		if err := dir.Put(record); err != nil {
			t.Fatal(err)
		}
	}
	for name, tt := range map[string]struct {
		ips         []netip.Addr
		pods        []*Pod
		gets, lists [2]int64 // least and most
	}{
		"on record, not shown": {ips: ips, gets: [2]int64{100, 20 + 20*13}},
		"nobody's":             {ips: []netip.Addr{ipA, ipB}},
		"two pods'":            {ips: []netip.Addr{ipA}, pods: []*Pod{reporting("a", ipA), reporting("b", ipA)}, lists: [2]int64{6, 2 + 7}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				api := &hanging{fails: true}
				r := NewResolver(ResolverConfig{Records: attachment.NewIndex(dir), Watch: synced(t, api, tt.pods...), API: api, Node: thisNode,
					MaxElapsed: 2 * time.Second, MaxInterval: 50 * time.Millisecond, AskDuplicates: true})
				atOnce(r, tt.ips...)
				if n := api.gets.Load(); n < tt.gets[0] || n > tt.gets[1] {
					t.Errorf("%d pods were asked for, want %d to %d", n, tt.gets[0], tt.gets[1])
				}
				if n := api.lists.Load(); n < tt.lists[0] || n > tt.lists[1] {
					t.Errorf("%d lists were asked for, want %d to %d", n, tt.lists[0], tt.lists[1])
				}
			})
		})
	}
}

// TestOnePodCannotUseUpTheAPIServer has one pod, by both of its addresses, ask without an end for what the API does not show. The API is
// asked little for it, and at once for its neighbours.
func TestOnePodCannotUseUpTheAPIServer(t *testing.T) {
	dir := attachment.In(t.TempDir())
	greedy := []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")}
	put := func(name string, ips ...netip.Addr) {
		record := testrecord.New(name, attachment.Pod{Namespace: "ns", Name: name, UID: name}, ips...)
		if err := dir.Put(record); err != nil {
			t.Fatal(err)
		}
	}
	put("greedy", greedy...)
	put("neighbour", ipA)
	shared := netip.MustParseAddr("10.0.0.9")
	synctest.Test(t, func(t *testing.T) {
		api := &hanging{fails: true}
		r := NewResolver(ResolverConfig{Records: attachment.NewIndex(dir), API: api, Node: thisNode, AskDuplicates: true,
			Watch:      synced(t, api, reporting("a", shared), reporting("b", shared), reporting("c", ipB), reporting("d", ipB)),
			MaxElapsed: 2 * time.Second, MaxInterval: 50 * time.Millisecond})
		var asking sync.WaitGroup
		asking.Go(func() { atOnce(r, append(greedy, shared)...) })
		time.Sleep(time.Second) // the greedy pods' list is due at even seconds
		for range 5 {
			before := api.lists.Load()
			ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
			api.mu.Lock()
			asked := api.pods["neighbour"]
			api.mu.Unlock()
			r.Resolve(ctx, r.Source(ipA))
			r.Resolve(ctx, r.Source(ipB))
			cancel()
			api.mu.Lock()
			if api.pods["neighbour"] != asked+1 {
				t.Error("the API was not asked for the neighbour at once")
			}
			api.mu.Unlock()
			if api.lists.Load() != before+1 {
				t.Error("the API was not asked at once whose the neighbours' address is")
			}
			time.Sleep(2 * time.Second)
		}
		asking.Wait()
		if n := api.pods["greedy"]; n < 20 || n > 4+2*13 {
			t.Errorf("the API was asked for the greedy pod %d times", n)
		}
		if n := api.lists.Load() - 5; n < 6 || n > 2+7 {
			t.Errorf("the API was asked whose the greedy pods' address is %d times", n)
		}
	})
}

// TestProxyThatLimitsItselfDoesNotBlameTheAPIServer has the API be asked for a pod until the pod's part is used up. Each
// request says whether the API did not answer it or was not asked.
func TestProxyThatLimitsItselfDoesNotBlameTheAPIServer(t *testing.T) {
	records := recordOfA(t)
	synctest.Test(t, func(t *testing.T) {
		api := &hanging{fails: true}
		r := NewResolver(ResolverConfig{Records: records, Watch: synced(t, api), API: api, Node: thisNode,
			MaxElapsed: 400 * time.Millisecond, MaxInterval: 10 * time.Millisecond})
		// Its first questions are not answered, and its later ones not asked.
		if _, err := r.Resolve(t.Context(), r.Source(ipA)); !errors.Is(err, ErrUnavailable) || errors.Is(err, ErrAskedTooOften) {
			t.Errorf("asked: %v", err)
		}
		r.c.MaxElapsed = 50 * time.Millisecond
		_, err := r.Resolve(t.Context(), r.Source(ipA))
		const want = "the proxy asks the API server at most 2 times a second for a pod, 20 times for the node"
		if !errors.Is(err, ErrAskedTooOften) || errors.Is(err, ErrUnavailable) || err.Error() != want {
			t.Errorf("not asked: %v", err)
		}
		if n := api.gets.Load(); n != 4 {
			t.Errorf("the API was asked %d times", n)
		}
	})
}

// TestAPIServerThatHangsIsAskedAgain has a question hang: its request looks again after a second, when the watch may have shown the pod.
func TestAPIServerThatHangsIsAskedAgain(t *testing.T) {
	records := recordOfA(t)
	synctest.Test(t, func(t *testing.T) {
		api := new(hanging)
		w := synced(t, api)
		r := NewResolver(ResolverConfig{Records: records, Watch: w, API: api, Node: thisNode, MaxElapsed: time.Minute, MaxInterval: time.Second})
		start := time.Now()
		time.AfterFunc(500*time.Millisecond, func() { w.replace("a", reporting("a")) })
		if p, err := r.Resolve(t.Context(), r.Source(ipA)); err != nil || p.Name != "a" || time.Since(start) > 1500*time.Millisecond {
			t.Errorf("%v, %v after %v", p, err, time.Since(start))
		}
		if waited := time.Duration(api.waited.Load()); waited != time.Second {
			t.Errorf("a question waited %v", waited)
		}
	})
}

// TestRecordOfAnotherNameIsNotBelieved has the API call the recorded UID something else.
func TestRecordOfAnotherNameIsNotBelieved(t *testing.T) {
	for name, recorded := range map[string]attachment.Pod{
		"another name":      {Namespace: "ns", Name: "b", UID: "a"},
		"another namespace": {Namespace: "other", Name: "a", UID: "a"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := attachment.In(t.TempDir())
			record := testrecord.New("c", recorded, ipA)
			if err := dir.Put(record); err != nil {
				t.Fatal(err)
			}
			r := NewResolver(ResolverConfig{Records: attachment.NewIndex(dir), Watch: synced(t, new(hanging), reporting("a", ipA)), Node: thisNode})
			if p, err := r.Resolve(t.Context(), r.Source(ipA)); !errors.Is(err, ErrUnknown) {
				t.Errorf("%v, %v", p, err)
			}
		})
	}
}

// TestNamespacesAreAskedForEverLessOften has the API server refuse them.
func TestNamespacesAreAskedForEverLessOften(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		api := &hanging{fails: true}
		n := NewNamespaces(NamespacesConfig{API: api, Log: slog.New(slog.DiscardHandler)})
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- n.Run(ctx) }()
		n.PodChanged(in("team", "a"))
		time.Sleep(10 * time.Minute)
		if asked := api.follows.Load(); asked < 14 || asked > 60 {
			t.Errorf("asked %d times in ten minutes", asked)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// TestNamespaceThatStaysTheSameIsNoChange has the API server tell of changes that concern nobody here.
func TestNamespaceThatStaysTheSameIsNoChange(t *testing.T) {
	changes := 0
	n := NewNamespaces(NamespacesConfig{API: new(hanging), Keys: []string{"allowed"}, Changed: func(string) { changes++ }, Log: slog.New(slog.DiscardHandler)})
	w := &watchedNamespace{of: n, name: "team", synced: make(chan struct{})}
	for i, tt := range []struct {
		annotations map[string]string
		exists      bool
		changes     int
	}{
		{nil, true, 1}, {map[string]string{"other": "x"}, true, 1}, {map[string]string{"allowed": "[]"}, true, 2},
		{map[string]string{"allowed": "[]", "other": "y"}, true, 2}, {nil, false, 3}, {nil, false, 3}, {nil, true, 4},
	} {
		if w.set(tt.annotations, tt.exists); changes != tt.changes {
			t.Errorf("%d: %d changes, want %d", i, changes, tt.changes)
		}
	}
}
