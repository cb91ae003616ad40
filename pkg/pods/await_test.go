package pods

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/test/kubeapi"
)

func TestFirstRequestCanPrecedeTheWatch(t *testing.T) {
	h := newHarness(t, func(c *ResolverConfig) { c.MaxElapsed, c.MaxInterval = 20*time.Second, time.Second })
	h.api.Down() // the watch is late
	a := h.api.PutPod(kubeapi.NewPod(thisNode, "ns", "a", map[string]string{roleKey: "a"}))
	h.record(ipA, "c1", recordOf(a))
	if err := h.api.Up(); err != nil {
		t.Fatal(err)
	}
	h.resolvesTo(ipA, "a")
}

func TestOutageOfTheAPIServer(t *testing.T) {
	h := newHarness(t, func(c *ResolverConfig) { c.MaxElapsed, c.MaxInterval = 100*time.Millisecond, 10*time.Millisecond })
	stored := h.running("stored", ipB.String())
	h.record(ipB, "c2", recordOf(stored))
	h.api.Down()
	h.resolvesTo(ipB, "stored")
	h.record(ipA, "c1", attachment.Pod{Namespace: "ns", Name: "a", UID: "u"})
	h.refuses(ipA, ErrUnavailable) // not ErrUnknown
}

func TestPodThatTheAPIDoesNotHaveIsRefusedWithoutWaiting(t *testing.T) {
	h := newHarness(t, func(c *ResolverConfig) { c.MaxElapsed, c.MaxInterval = time.Hour, time.Second })
	h.record(ipA, "c1", attachment.Pod{Namespace: "ns", Name: "a", UID: "u"})
	h.refuses(ipA, ErrUnknown)
}

func TestChangeOfThePodsEndsTheWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := syncedWatch(new(hangingAPI))
		r := NewResolver(ResolverConfig{Records: noRecords(t), Watch: w, MaxElapsed: time.Minute, MaxInterval: 30 * time.Second})
		start := time.Now()
		time.AfterFunc(20*time.Second, func() { w.put(reporter("a", ipA)) })
		if p, err := r.Resolve(t.Context(), r.Source(ipA)); err != nil || p.Name != "a" || time.Since(start) != 20*time.Second {
			t.Errorf("%v, %v after %v", p, err, time.Since(start))
		}
	})
}

func TestIntervalsOfRequestsGrowUpToMaxInterval(t *testing.T) {
	records := recordOfA(t)
	synctest.Test(t, func(t *testing.T) {
		api := &hangingAPI{fails: true}
		r := NewResolver(ResolverConfig{Records: records, Watch: syncedWatch(api), MaxElapsed: 10 * time.Second, MaxInterval: time.Second})
		if _, err := r.Resolve(t.Context(), r.Source(ipA)); !errors.Is(err, ErrUnavailable) {
			t.Error(err)
		}
		if n := api.gets.Load(); n < 13 || n > 16 {
			t.Errorf("%d requests in ten seconds", n)
		}
	})
}

// TestRequestTimesOutAfterASecond checks that the lookup continues after the timeout: the watch may
// have received the pod.
func TestRequestTimesOutAfterASecond(t *testing.T) {
	records := recordOfA(t)
	synctest.Test(t, func(t *testing.T) {
		api := new(hangingAPI)
		w := syncedWatch(api)
		r := NewResolver(ResolverConfig{Records: records, Watch: w, MaxElapsed: time.Minute, MaxInterval: time.Second})
		start := time.Now()
		time.AfterFunc(500*time.Millisecond, func() { w.put(reporter("a")) })
		if p, err := r.Resolve(t.Context(), r.Source(ipA)); err != nil || p.Name != "a" || time.Since(start) > 1500*time.Millisecond {
			t.Errorf("%v, %v after %v", p, err, time.Since(start))
		}
		if longest := time.Duration(api.longest.Load()); longest != time.Second {
			t.Errorf("a request waited %v", longest)
		}
	})
}

// TestAmbiguousAddressIsWaitedForIfTheAPIHasTheRecordedPod ends the other pod after a second.
func TestAmbiguousAddressIsWaitedForIfTheAPIHasTheRecordedPod(t *testing.T) {
	dir := t.TempDir()
	young := kubeapi.NewRunningPod(thisNode, "ns", "young", nil)
	putRecord(t, dir, "c", recordOf(young), ipA)
	synctest.Test(t, func(t *testing.T) {
		w := syncedWatch(&answeringAPI{pods: map[string]*corev1.Pod{"young": young}}, reporter("old", ipA))
		r := NewResolver(ResolverConfig{Records: attachment.NewIndex(attachment.In(dir)), Watch: w, MaxElapsed: 5 * time.Second, MaxInterval: time.Second})
		time.AfterFunc(time.Second, func() { w.remove(reporter("old")) })
		if p, err := r.Resolve(t.Context(), r.Source(ipA)); err != nil || p.Name != "young" {
			t.Errorf("%v, %v", p, err)
		}
	})
}

// TestResolveDuplicates has a watch with two pods that report one address, and an API server with
// newer states of them.
func TestResolveDuplicates(t *testing.T) {
	second := netip.MustParseAddr("fd00::1")
	running := func(name string, ips ...string) *corev1.Pod {
		p := kubeapi.NewRunningPod(thisNode, "ns", name, nil, ips...)
		p.UID = reporter(name).UID
		return p
	}
	finished := running("b", ipA.String(), second.String())
	finished.Status.Phase = corev1.PodSucceeded
	a := running("a", ipA.String(), second.String())
	for name, tt := range map[string]struct {
		isOff    bool
		recorded string
		pods     []*corev1.Pod // that the API server has
		want     string        // the pod, or empty if the address is ambiguous
	}{
		"not asked":                         {isOff: true, pods: []*corev1.Pod{a}},
		"one is deleted":                    {pods: []*corev1.Pod{a}, want: "a"},
		"one has finished":                  {pods: []*corev1.Pod{a, finished}, want: "a"},
		"one has another address":           {pods: []*corev1.Pod{a, running("b", ipB.String())}, want: "a"},
		"both report it":                    {pods: []*corev1.Pod{a, running("b", ipA.String(), second.String())}},
		"the recorded one does not":         {recorded: "former", pods: []*corev1.Pod{a, finished, running("former")}},
		"only the recorded one reports it":  {recorded: "a", pods: []*corev1.Pod{a, finished}, want: "a"},
		"the recorded one and another does": {recorded: "a", pods: []*corev1.Pod{a, running("b", ipA.String(), second.String())}},
	} {
		t.Run(name, func(t *testing.T) {
			for _, ip := range []netip.Addr{ipA, second} {
				dir := t.TempDir()
				if tt.recorded != "" {
					putRecord(t, dir, "c", recordOf(running(tt.recorded)), ip)
				}
				synctest.Test(t, func(t *testing.T) {
					api := &answeringAPI{pods: make(map[string]*corev1.Pod)}
					for _, p := range tt.pods {
						api.pods[p.Name] = p
					}
					w := syncedWatch(api, reporter("former"), reporter("a", ipA, second), reporter("b", ipA, second))
					r := NewResolver(ResolverConfig{Records: attachment.NewIndex(attachment.In(dir)), Watch: w,
						MaxElapsed: 50 * time.Millisecond, MaxInterval: 10 * time.Millisecond, ResolveDuplicates: !tt.isOff})
					p, err := r.Resolve(t.Context(), r.Source(ip))
					if tt.want == "" && !errors.Is(err, ErrAmbiguous) || tt.want != "" && (err != nil || p.Name != tt.want) {
						t.Errorf("%s: %v, %v; want %q", ip, p, err, tt.want)
					}
				})
			}
		})
	}
}

// TestResolveManyDuplicates has stale pods that report the address of a running pod, and requests
// for it each second.
func TestResolveManyDuplicates(t *testing.T) {
	a := kubeapi.NewRunningPod(thisNode, "ns", "a", nil, ipA.String())
	a.UID = reporter("a").UID
	dir := t.TempDir()
	putRecord(t, dir, "c", recordOf(a), ipA)
	synctest.Test(t, func(t *testing.T) {
		api := &answeringAPI{pods: map[string]*corev1.Pod{"a": a}}
		w := syncedWatch(api, reporter("a", ipA))
		for i := range 7 {
			w.put(reporter(fmt.Sprint("stale-", i), ipA))
		}
		r := NewResolver(ResolverConfig{Records: attachment.NewIndex(attachment.In(dir)), Watch: w,
			MaxElapsed: 2 * time.Second, MaxInterval: time.Second, ResolveDuplicates: true})
		for range 20 {
			if p, err := r.Resolve(t.Context(), r.Source(ipA)); err != nil || p.Name != "a" {
				t.Errorf("%v, %v", p, err)
			}
			time.Sleep(time.Second)
		}
		if n := api.gets.Load(); n != 20*8 {
			t.Errorf("%d requests, want 8 each time", n)
		}
	})
}

// resolveRepeatedly resolves each address twice a second, for ten seconds.
func resolveRepeatedly(r *Resolver, ips ...netip.Addr) {
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

// TestRequestsOfTheNodeAreLimited has many pods whose addresses do not become known.
func TestRequestsOfTheNodeAreLimited(t *testing.T) {
	dir := t.TempDir()
	var recorded, ambiguous []netip.Addr
	var pods []*Pod
	for i := range 20 {
		ip := netip.AddrFrom4([4]byte{10, 0, 1, byte(i)})
		recorded = append(recorded, ip)
		putRecord(t, dir, fmt.Sprint("c", i), attachment.Pod{Namespace: "ns", Name: fmt.Sprint("pod-", i), UID: fmt.Sprint("uid-", i)}, ip)
		ip = netip.AddrFrom4([4]byte{10, 0, 2, byte(i)})
		ambiguous = append(ambiguous, ip)
		pods = append(pods, reporter(fmt.Sprint("a-", i), ip), reporter(fmt.Sprint("b-", i), ip))
	}
	for name, tt := range map[string]struct {
		ips         []netip.Addr
		least, most int64
	}{
		"records that the watch does not show": {recorded, 100, 20 + 20*13},
		"ambiguous addresses":                  {ambiguous, 100, 20 + 20*13},
		"addresses without a holder":           {[]netip.Addr{ipA, ipB}, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				api := &hangingAPI{fails: true}
				r := NewResolver(ResolverConfig{Records: attachment.NewIndex(attachment.In(dir)), Watch: syncedWatch(api, pods...),
					MaxElapsed: 2 * time.Second, MaxInterval: 50 * time.Millisecond, ResolveDuplicates: true})
				resolveRepeatedly(r, tt.ips...)
				if n := api.gets.Load(); n < tt.least || n > tt.most {
					t.Errorf("%d requests, want %d to %d", n, tt.least, tt.most)
				}
			})
		})
	}
}

// TestRequestsOfAPodAreLimited has a pod that connects from both of its addresses without a pause,
// and one whose address is ambiguous. Requests for their neighbours are made at once.
func TestRequestsOfAPodAreLimited(t *testing.T) {
	dir := t.TempDir()
	greedy := []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")}
	putRecord(t, dir, "greedy", attachment.Pod{Namespace: "ns", Name: "greedy", UID: "greedy"}, greedy...)
	putRecord(t, dir, "neighbour", attachment.Pod{Namespace: "ns", Name: "neighbour", UID: "neighbour"}, ipA)
	shared := netip.MustParseAddr("10.0.0.9")
	synctest.Test(t, func(t *testing.T) {
		api := &hangingAPI{fails: true}
		r := NewResolver(ResolverConfig{Records: attachment.NewIndex(attachment.In(dir)), ResolveDuplicates: true,
			Watch:      syncedWatch(api, reporter("a", shared), reporter("b", shared), reporter("c", ipB), reporter("d", ipB)),
			MaxElapsed: 2 * time.Second, MaxInterval: 50 * time.Millisecond})
		var resolving sync.WaitGroup
		resolving.Go(func() { resolveRepeatedly(r, append(greedy, shared)...) })
		time.Sleep(time.Second)
		for i := range 5 {
			for _, ip := range []netip.Addr{ipA, ipB} {
				ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
				r.Resolve(ctx, r.Source(ip))
				cancel()
			}
			if n := api.getsOf("neighbour"); n != i+1 {
				t.Errorf("%d requests for the neighbour, want %d", n, i+1)
			}
			if n := api.getsOf("c"); n != i+1 {
				t.Errorf("%d requests for the neighbours with one address, want %d", n, i+1)
			}
			time.Sleep(2 * time.Second)
		}
		resolving.Wait()
		for _, pod := range []string{"greedy", "a"} {
			if n := api.getsOf(pod); n < 20 || n > 4+2*13 {
				t.Errorf("%d requests for %s", n, pod)
			}
		}
	})
}

// TestOwnLimitIsNotBlamedOnTheAPIServer uses up the pod's requests. The error says whether the API
// server did not answer, or the proxy sent no request.
func TestOwnLimitIsNotBlamedOnTheAPIServer(t *testing.T) {
	records := recordOfA(t)
	synctest.Test(t, func(t *testing.T) {
		api := &hangingAPI{fails: true}
		r := NewResolver(ResolverConfig{Records: records, Watch: syncedWatch(api), MaxElapsed: 400 * time.Millisecond, MaxInterval: 10 * time.Millisecond})
		if _, err := r.Resolve(t.Context(), r.Source(ipA)); !errors.Is(err, ErrUnavailable) || errors.Is(err, ErrRateLimited) {
			t.Errorf("with a request: %v", err)
		}
		r.c.MaxElapsed = 50 * time.Millisecond
		_, err := r.Resolve(t.Context(), r.Source(ipA))
		const want = "the proxy asks the API server at most 2 times a second for a pod, 20 times for the node"
		if !errors.Is(err, ErrRateLimited) || errors.Is(err, ErrUnavailable) || err.Error() != want {
			t.Errorf("without a request: %v", err)
		}
		if n := api.gets.Load(); n != 4 {
			t.Errorf("%d requests", n)
		}
	})
}
