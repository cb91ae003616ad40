package pods

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/test/kubeapi"
	"github.com/kube2iam-cni/kube2iam-cni/test/testrecord"
)

func TestSameHolder(t *testing.T) {
	b := newBed(t, nil)
	holder := func(container, uid string) Source {
		b.record(ipA, container, attachment.Pod{Namespace: "ns", Name: uid, UID: uid})
		return b.resolver.Source(ipA)
	}
	first := holder("c1", "a")
	if !first.Same(holder("c1", "a")) || first.Same(holder("c1", "b")) || first.Same(holder("c2", "a")) || first.Same(b.resolver.Source(ipB)) {
		t.Error("another holder passes for the same, or the same for another")
	}
}

// TestSameHolderWithoutRecords has the address go from one pod that reports it to another.
func TestSameHolderWithoutRecords(t *testing.T) {
	w := synced(t, new(hanging))
	r := NewResolver(ResolverConfig{Records: attachment.NewIndex(attachment.In(t.TempDir())), Watch: w, Node: thisNode})
	before := r.Source(ipA)
	w.replace("a", reporting("a", ipA))
	first := r.Source(ipA)
	if !before.Same(first) || !first.Same(r.Source(ipA)) {
		t.Error("the same holder passes for another")
	}
	w.replace("a", nil)
	if first.Same(r.Source(ipA)) {
		t.Error("nobody passes for the holder")
	}
	w.replace("b", reporting("b", ipA))
	if first.Same(r.Source(ipA)) {
		t.Error("another holder passes for the same")
	}
}

func TestAddressThatTwoPodsReportHasNoHolder(t *testing.T) {
	b := newBed(t, nil)
	b.running("a", ipA.String())
	b.running("b", ipA.String())
	if holder := b.resolver.Source(ipA).Holder(); holder != "" {
		t.Errorf("%q", holder)
	}
}

func TestLooksBecomeRarerUpToABound(t *testing.T) {
	records := recordOfA(t)
	synctest.Test(t, func(t *testing.T) {
		api := &hanging{fails: true}
		r := NewResolver(ResolverConfig{Records: records, Watch: synced(t, api), API: api, Node: thisNode, MaxElapsed: 10 * time.Second, MaxInterval: time.Second})
		if _, err := r.Resolve(t.Context(), r.Source(ipA)); !errors.Is(err, ErrUnavailable) {
			t.Error(err)
		}
		if n := api.gets.Load(); n < 13 || n > 16 {
			t.Errorf("asked %d times in ten seconds", n)
		}
	})
}

// listing is an API server that lists these pods, and a part of a list.
type listing struct {
	hanging
	pods corev1.PodList
}

func (l *listing) ListPods(context.Context, metav1.ListOptions) (*corev1.PodList, error) {
	return &l.pods, nil
}

func TestPartOfAListIsNoAnswer(t *testing.T) {
	for next, want := range map[string]error{"": nil, "more": ErrAmbiguous} {
		synctest.Test(t, func(t *testing.T) {
			api := &listing{pods: corev1.PodList{ListMeta: metav1.ListMeta{Continue: next}}}
			ended := kubeapi.NewRunningPod(thisNode, "ns", "ended", nil, ipA.String())
			ended.Status.Phase = corev1.PodSucceeded
			api.pods.Items = []corev1.Pod{*kubeapi.NewRunningPod(thisNode, "ns", "a", nil, ipA.String()), *ended, *kubeapi.NewRunningPod(thisNode, "ns", "b", nil, ipB.String())}
			r := NewResolver(ResolverConfig{Records: attachment.NewIndex(attachment.In(t.TempDir())), Watch: synced(t, api, reporting("a", ipA), reporting("b", ipA)), API: api, Node: thisNode,
				MaxElapsed: time.Second, MaxInterval: time.Second, AskDuplicates: true, Keep: func(string) bool { return true }})
			if p, err := r.Resolve(t.Context(), r.Source(ipA)); !errors.Is(err, want) {
				t.Errorf("%q: %v, %v", next, p, err)
			}
		})
	}
}

// telling is an API server that knows a pod the watch has not shown.
type telling struct {
	hanging
	pod *corev1.Pod
}

func (s *telling) GetPod(context.Context, string, string) (*corev1.Pod, error) { return s.pod, nil }

func TestTwoPodsAreWaitedForThoughTheAPIKnowsTheRecordedOne(t *testing.T) {
	dir := attachment.In(t.TempDir())
	young := kubeapi.NewRunningPod(thisNode, "ns", "young", nil)
	record := testrecord.New("c", of(young), ipA)
	if err := dir.Put(record); err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		api := &telling{pod: young}
		w := synced(t, api, reporting("old", ipA))
		r := NewResolver(ResolverConfig{Records: attachment.NewIndex(dir), Watch: w, API: api, Node: thisNode, MaxElapsed: 5 * time.Second, MaxInterval: time.Second, Keep: func(string) bool { return true }})
		time.AfterFunc(time.Second, func() { w.replace("old", nil) })
		if p, err := r.Resolve(t.Context(), r.Source(ipA)); err != nil || p.Name != "young" {
			t.Errorf("%v, %v", p, err)
		}
	})
}

func TestWatchOfANamespaceEndsWithItsLastPod(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		api := new(hanging)
		n := NewNamespaces(NamespacesConfig{API: api, Log: slog.New(slog.DiscardHandler)})
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- n.Run(ctx) }()
		n.PodChanged(in("team", "a"))
		time.Sleep(time.Second)
		n.PodGone(in("team", "a"))
		time.Sleep(time.Second)
		if waited := time.Duration(api.waited.Load()); waited != time.Second {
			t.Errorf("it was watched for %v", waited)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		n.PodChanged(in("late", "a"))
		if n.Len() != 0 {
			t.Error("a watch begins after the end")
		}
	})
}

func TestNamespaceIsKnownToWhoHearsOfIt(t *testing.T) {
	for _, exists := range []bool{true, false} {
		var n *Namespaces
		heard := 0
		n = NewNamespaces(NamespacesConfig{API: new(hanging), Changed: func(string) {
			heard++
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			if _, err := n.Annotations(ctx, "team"); errors.Is(err, ErrNotShown) {
				t.Error(err)
			}
		}, Log: slog.New(slog.DiscardHandler)})
		w := &watchedNamespace{of: n, name: "team", synced: make(chan struct{})}
		n.watched["team"] = w
		if w.set(nil, exists); heard != 1 {
			t.Errorf("exists %v: told %d times", exists, heard)
		}
	}
}

// slowToEnd is an API server whose watches of namespaces take a second more after their context has ended.
type slowToEnd struct {
	hanging
	ended atomic.Bool
}

func (s *slowToEnd) FollowNamespace(ctx context.Context, _ string, _ func(map[string]string, bool)) error {
	<-ctx.Done()
	time.Sleep(time.Second)
	s.ended.Store(true)
	return nil
}

func TestEndWaitsForWatchesOfNamespaces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		api := new(slowToEnd)
		n := NewNamespaces(NamespacesConfig{API: api, Log: slog.New(slog.DiscardHandler)})
		n.PodChanged(in("team", "a"))
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := n.Run(ctx); err != nil || !api.ended.Load() {
			t.Errorf("%v, and a watch is there", err)
		}
	})
}

func TestAddressesOfPodsThatAreGoneAreForgotten(t *testing.T) {
	w := synced(t, new(hanging), reporting("a", ipA, ipB))
	w.replace("a", reporting("a", ipB))
	if len(w.byIP) != 1 {
		t.Errorf("%d addresses", len(w.byIP))
	}
	w.replace("a", nil)
	if len(w.byIP) != 0 {
		t.Errorf("%d addresses", len(w.byIP))
	}
}

func TestHolderOfAStaticPodIsItsOwnUID(t *testing.T) {
	static := reporting("mirror", ipA)
	static.Mirror = "static"
	r := NewResolver(ResolverConfig{Records: attachment.NewIndex(attachment.In(t.TempDir())), Watch: synced(t, new(hanging), static), Node: thisNode})
	if holder := r.Source(ipA).Holder(); holder != "static" {
		t.Errorf("%q", holder)
	}
}

func TestWhoWaitsHearsOfAChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := synced(t, new(hanging))
		r := NewResolver(ResolverConfig{Records: attachment.NewIndex(attachment.In(t.TempDir())), Watch: w, Node: thisNode, MaxElapsed: time.Minute, MaxInterval: 30 * time.Second})
		start := time.Now()
		time.AfterFunc(20*time.Second, func() { w.replace("a", reporting("a", ipA)) })
		if p, err := r.Resolve(t.Context(), r.Source(ipA)); err != nil || p.Name != "a" || time.Since(start) != 20*time.Second {
			t.Errorf("%v, %v after %v", p, err, time.Since(start))
		}
	})
}

// TestIdentity tells holders of an address apart, and knows a pod again that is put on record.
func TestIdentity(t *testing.T) {
	root := t.TempDir()
	b := newBed(t, func(c *ResolverConfig) { c.Records = attachment.NewIndex(attachment.In(root)) })
	b.dir = attachment.In(root)
	identity := func() string { return b.resolver.Source(ipA).Identity() }
	if got := identity(); got != "" {
		t.Errorf("nobody's address: %q", got)
	}
	a := b.running("a", ipA.String())
	reported := identity()
	b.record(ipA, "c1", of(a))
	if recorded := identity(); reported == "" || recorded != reported {
		t.Errorf("%q where the pod reports the address, %q where it is on record", reported, recorded)
	}
	b.record(ipA, "c2", attachment.Pod{Namespace: "ns", Name: "a"})
	second := identity()
	b.record(ipA, "c3", attachment.Pod{Namespace: "ns", Name: "a"})
	third := identity()
	if second == "" || third == "" || second == third || second == reported {
		t.Errorf("without UIDs, one pod is %q and the next %q", second, third)
	}
	if err := os.Remove(filepath.Join(root, "by-ip", ipA.String())); err != nil {
		t.Fatal(err)
	}
	spoil(t, root, ipA)
	if got := identity(); got == "" || got == reported || got == third {
		t.Errorf("a record that cannot be read: %q", got)
	}
}
