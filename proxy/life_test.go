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
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/client-go/rest"
	clienttesting "k8s.io/client-go/testing"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/credentials"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/kube"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
	"github.com/kube2iam-cni/kube2iam-cni/test/kubeapi"
	"github.com/kube2iam-cni/kube2iam-cni/test/testrecord"
)

const roleKey = "iam.amazonaws.com/role"

// TestAPIServerOutage: known pods are served during an outage of an hour, in which their credentials are
// renewed.
func TestAPIServerOutage(t *testing.T) {
	// client-go sleeps between two errors by the time of the last one, which can be real or another bubble's.
	defer func(h []utilruntime.ErrorHandler) { utilruntime.ErrorHandlers = h }(utilruntime.ErrorHandlers)
	utilruntime.ErrorHandlers = nil
	synctest.Test(t, func(t *testing.T) {
		client := fake.NewClientset(&corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "pod", UID: "uid", Annotations: map[string]string{roleKey: "reader"}},
			Spec:       corev1.PodSpec{NodeName: "node-1"},
			Status:     corev1.PodStatus{Phase: corev1.PodRunning, PodIP: "10.0.0.1"},
		})
		var isDown atomic.Bool
		var refused atomic.Int64
		var mu sync.Mutex
		var watches []watch.Interface
		client.PrependReactor("*", "*", func(clienttesting.Action) (bool, runtime.Object, error) {
			if !isDown.Load() {
				return false, nil, nil
			}
			refused.Add(1)
			return true, nil, apierrors.NewServiceUnavailable("down")
		})
		client.PrependWatchReactor("*", func(a clienttesting.Action) (bool, watch.Interface, error) {
			if isDown.Load() {
				refused.Add(1)
				return true, nil, apierrors.NewServiceUnavailable("down")
			}
			w, err := client.Tracker().Watch(a.GetResource(), a.GetNamespace())
			mu.Lock()
			defer mu.Unlock()
			watches = append(watches, w)
			return true, w, err
		})
		p, _, end := startComponents(t, fakeAPI{client}, nil)
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
		isDown.Store(true)
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
			t.Errorf("%d requests to the API server were refused, want at least 60", refused.Load())
		}
	})
}

// TestNoStateIsLeftOfPods creates, changes and deletes a thousand pods in random order, with and without
// records, and requests credentials for some.
func TestNoStateIsLeftOfPods(t *testing.T) {
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
	p, records, end := startComponents(t, client, func(o *options) {
		o.rules.Restriction = &roles.Restriction{Key: "allowed", Format: roles.Glob}
		o.rules.DefaultRole = "default"
		o.maxElapsed, o.maxInterval = 100*time.Millisecond, 20*time.Millisecond // the watch is later than the test
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
	served, refused := 0, 0
	address := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, byte(i / 250), byte(i%250 + 1)}) }
	remove := func(i int) {
		gone := alive[i]
		alive = append(alive[:i], alive[i+1:]...)
		if err := records.Delete(string(gone.UID), "eth0"); err != nil {
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
		case 3:
			created.Annotations[roleKey] = "role-denied/denied"
		}
		new := pod{api.PutPod(created), address(i)}
		alive = append(alive, new)
		if chance.IntN(2) == 0 {
			err := records.Put(testrecord.New(string(new.UID), attachment.Pod{Namespace: new.Namespace, Name: new.Name, UID: string(new.UID)}, new.ip))
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
			soon, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			switch _, err := p.broker.Caller(asks.ip, time.Now()).Credentials(soon, asks.Annotations[roleKey]); {
			case err != nil:
				refused++
			case !strings.HasPrefix(asks.Annotations[roleKey], "role-"):
				t.Errorf("credentials for the role %q", asks.Annotations[roleKey])
			default:
				served++
			}
			cancel()
		}
		if chance.IntN(10) == 0 {
			allowed := `["role-*"]`
			if chance.IntN(3) == 0 {
				allowed = fmt.Sprintf(`["role-%d*"]`, chance.IntN(5))
			}
			api.PutNamespace(fmt.Sprint("ns-", chance.IntN(20)), map[string]string{"allowed": allowed})
		}
		for len(alive) > 100 || len(alive) > 0 && chance.IntN(3) == 0 {
			remove(chance.IntN(len(alive)))
		}
	}
	for len(alive) > 0 {
		remove(0)
	}
	t.Logf("%d requests were served and %d refused", served, refused)
	if served < 30 || refused < 30 {
		t.Errorf("%d requests were served and %d refused: too few for this test", served, refused)
	}
	left := func() string {
		return fmt.Sprintf("%d pods, %d decisions, %d namespaces, %d holders, %d told", p.watch.Len(), len(p.broker.Assignments()), p.namespaces.Len(),
			p.cache.Stats().Holders, p.events.Len())
	}
	const nothing = "0 pods, 0 decisions, 0 namespaces, 0 holders, 0 told"
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
	// The cache keeps an assumption for a minute after its last use.
	if n := p.cache.Stats().Entries; n > served+refused {
		t.Errorf("%d assumptions are known, of %d that were asked for", n, served+refused)
	}
	ended()
}

// TestAccessDeniedIsReportedAsEvent: an error of STS becomes an Event, and no state is left after the pod
// is deleted.
func TestAccessDeniedIsReportedAsEvent(t *testing.T) {
	api, err := kubeapi.Start(kubeapi.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer api.Close()
	client, err := kube.New(&rest.Config{Host: api.URL(), QPS: -1})
	if err != nil {
		t.Fatal(err)
	}
	p, _, end := startComponents(t, client, nil)
	defer end()
	api.PutPod(kubeapi.NewPod("node-1", "ns", "pod", map[string]string{roleKey: "denied"}))
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(30 * time.Second)
	eventually := func(what string, holds func() bool) {
		t.Helper()
		for !holds() {
			select {
			case <-tick.C:
			case <-deadline:
				t.Fatalf("%s: not within the deadline", what)
			}
		}
	}
	eventually("an event", func() bool { return len(api.Events()) > 0 })
	if e := api.Events()[0]; e.Reason != "IAMRoleDenied" || e.InvolvedObject.Name != "pod" {
		t.Errorf("%+v", e)
	}
	if err := api.DeletePod("ns", "pod"); err != nil {
		t.Fatal(err)
	}
	eventually("forgotten", func() bool { return p.events.Len() == 0 && p.cache.Stats().Holders == 0 })
}

// TestPendingRequestIsAnsweredAtShutdown cancels the context while a request waits for STS.
func TestPendingRequestIsAnsweredAtShutdown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := &options{node: "node-1", rules: roles.Rules{RoleKey: roleKey, Duration: time.Hour}}
		p := newComponents(o, fakeAPI{fake.NewClientset()}, slowSTS{}, attachment.NewIndex(attachment.In(t.TempDir())), slog.New(slog.DiscardHandler))
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Second, cancel)
		var answer error
		err := p.run(ctx, func(ctx context.Context) error {
			a := roles.Assumption{RoleARN: "arn:aws:iam::123456789012:role/a", SessionName: "ns.pod", Duration: time.Hour}
			_, answer = p.cache.Get(context.Background(), "pod", a)
			return nil
		})
		if err != nil || answer != nil || ctx.Err() == nil {
			t.Errorf("%v, answered %v", err, answer)
		}
	})
}

// slowSTS takes three seconds.
type slowSTS struct{}

func (slowSTS) AssumeRole(ctx context.Context, a roles.Assumption) (*credentials.Credentials, error) {
	select {
	case <-time.After(3 * time.Second):
		return new(countingSTS).AssumeRole(ctx, a)
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func TestClampChained(t *testing.T) {
	for _, tt := range []struct {
		through         string
		asked, duration time.Duration
	}{
		{"", 12 * time.Hour, 12 * time.Hour}, {"arn", 12 * time.Hour, time.Hour}, {"arn", time.Hour, time.Hour}, {"arn", 15 * time.Minute, 15 * time.Minute},
	} {
		o := &options{throughRole: tt.through, rules: roles.Rules{Duration: tt.asked}}
		var log strings.Builder
		clampChained(o, slog.New(slog.NewTextHandler(&log, nil)))
		if o.rules.Duration != tt.duration || (log.Len() > 0) != (tt.duration != tt.asked) {
			t.Errorf("%+v: %v, logged %q", tt, o.rules.Duration, log.String())
		}
	}
}
