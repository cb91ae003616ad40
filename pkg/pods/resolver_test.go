package pods

import (
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/test/kubeapi"
	"github.com/kube2iam-cni/kube2iam-cni/test/testrecord"
)

func TestRecordResolvesAPodWithoutStatus(t *testing.T) {
	b := newBed(t, nil)
	a := b.pending("a")
	b.refused(ipA, ErrUnknown)
	if holder := b.resolver.Source(ipA).Holder(); holder != "" {
		t.Errorf("held by %q without a record", holder)
	}
	b.record(ipA, "c1", of(a))
	b.want(ipA, "a")
	if holder := b.resolver.Source(ipA).Holder(); holder != string(a.UID) {
		t.Errorf("held by %q", holder)
	}
}

func TestStatusResolvesAPodWithoutRecord(t *testing.T) {
	b := newBed(t, nil)
	b.running("a", ipA.String(), "fd00::5")
	b.want(ipA, "a")
	b.want(netip.MustParseAddr("fd00::5"), "a")
}

func TestReusedAddressIsTheNewPodsAtOnce(t *testing.T) {
	b := newBed(t, nil)
	old := b.running("old", ipA.String())
	b.record(ipA, "c1", of(old))
	b.want(ipA, "old")
	// The old one completes; its address goes to a pod whose status does not say so yet.
	if err := b.api.SetStatus("ns", "old", corev1.PodSucceeded, ipA.String()); err != nil {
		t.Fatal(err)
	}
	b.eventually("finished", func() bool { return b.known(old.UID).Finished })
	b.refused(ipA, ErrFinished)
	young := b.pending("young")
	b.record(ipA, "c2", of(young))
	b.want(ipA, "young")
	// And when its status says so too.
	if err := b.api.SetStatus("ns", "young", corev1.PodRunning, ipA.String()); err != nil {
		t.Fatal(err)
	}
	b.eventually("status", func() bool { return len(b.known(young.UID).IPs) == 1 })
	b.want(ipA, "young")
}

func TestRecordIsNotBelievedAgainstAnotherRunningPod(t *testing.T) {
	b := newBed(t, nil)
	gone := b.running("gone", ipB.String())
	b.record(ipA, "c1", of(gone)) // its DEL never came, and it has another address by now
	b.running("holder", ipA.String())
	b.refused(ipA, ErrAmbiguous)
}

func TestRecordIsNotBelievedOfAnotherUID(t *testing.T) {
	b := newBed(t, nil)
	a := b.pending("a")
	stale := of(a)
	stale.UID = "an-earlier-a"
	b.record(ipA, "c1", stale)
	b.refused(ipA, ErrUnknown)
}

func TestRecordWithoutUIDNeedsThePodsOwnWord(t *testing.T) {
	b := newBed(t, nil)
	a := b.pending("a")
	nameless := of(a)
	nameless.UID = ""
	b.record(ipA, "c1", nameless)
	b.refused(ipA, ErrUnknown)
	if err := b.api.SetStatus("ns", "a", corev1.PodRunning, ipA.String()); err != nil {
		t.Fatal(err)
	}
	b.eventually("status", func() bool { return len(b.known(a.UID).IPs) == 1 })
	b.want(ipA, "a")
}

func TestPodThatIsBeingDeletedNeedsARecord(t *testing.T) {
	b := newBed(t, nil)
	p := kubeapi.NewRunningPod(thisNode, "ns", "a", map[string]string{roleKey: "a"}, ipA.String())
	now := metav1.Now()
	p.DeletionTimestamp, p.Finalizers = &now, []string{"test/wait"}
	p = b.seen(b.api.PutPod(p))
	b.refused(ipA, ErrUnknown) // its DEL may have been, and the address may be the next one's
	b.record(ipA, "c1", of(p))
	b.want(ipA, "a")
}

func TestNothingIsResolvedBeforeTheListIsWhole(t *testing.T) {
	for _, recorded := range []bool{false, true} {
		b := newBed(t, func(c *ResolverConfig) {
			half, err := NewWatch(WatchConfig{API: c.API, Node: thisNode, Keep: c.Keep, Log: slog.New(slog.DiscardHandler)})
			if err != nil {
				t.Fatal(err)
			}
			half.replace("a", &Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "a", UID: "a"}, Node: thisNode, IPs: []netip.Addr{ipA}})
			c.Watch = half
		})
		if recorded {
			b.record(ipA, "c1", attachment.Pod{Namespace: "ns", Name: "a", UID: "a"})
		}
		b.refused(ipA, ErrUnavailable)
		close(b.resolver.c.Watch.synced)
		b.want(ipA, "a")
	}
}

func TestStaticPodIsFoundByItsMirror(t *testing.T) {
	b := newBed(t, nil)
	p := kubeapi.NewPod(thisNode, "ns", "static", map[string]string{roleKey: "static", corev1.MirrorPodAnnotationKey: "hash-of-the-manifest"})
	p = b.seen(b.api.PutPod(p))
	b.record(ipA, "c1", attachment.Pod{Namespace: "ns", Name: "static", UID: "hash-of-the-manifest"})
	b.want(ipA, "static")
	// The annotation on a pod of another name moves no address to it.
	b.seen(b.api.PutPod(kubeapi.NewPod(thisNode, "ns", "thief", map[string]string{roleKey: "thief", corev1.MirrorPodAnnotationKey: "hash-of-the-manifest"})))
	b.want(ipA, "static")
}

func TestAddressOfAContainerThatIsNoPodIsRefused(t *testing.T) {
	b := newBed(t, nil)
	b.running("a", ipA.String())
	b.record(ipA, "c1", attachment.Pod{})
	b.refused(ipA, ErrNotAPod)
}

func TestTwoPodsReportingOneAddressAreRefused(t *testing.T) {
	b := newBed(t, nil)
	b.running("a", ipA.String())
	b.running("b", ipA.String())
	b.refused(ipA, ErrAmbiguous)
	if err := b.api.DeletePod("ns", "b"); err != nil {
		t.Fatal(err)
	}
	b.eventually("deleted", func() bool { return b.watch.Len() == 1 })
	b.want(ipA, "a")
}

func TestHostNetworkPodsHaveNoAddress(t *testing.T) {
	b := newBed(t, nil)
	p := kubeapi.NewRunningPod(thisNode, "ns", "host", map[string]string{roleKey: "host"}, ipA.String())
	p.Spec.HostNetwork = true
	p = b.seen(b.api.PutPod(p))
	b.refused(ipA, ErrUnknown)
	b.record(ipA, "c1", of(p))
	b.refused(ipA, ErrUnknown)
}

func TestPodOfAnotherNodeIsNotResolved(t *testing.T) {
	b := newBed(t, func(c *ResolverConfig) { c.MaxElapsed, c.MaxInterval = time.Hour, time.Second })
	p := b.api.PutPod(kubeapi.NewRunningPod("node-2", "ns", "far", map[string]string{roleKey: "far"}, ipA.String()))
	b.record(ipA, "c1", of(p))
	b.refused(ipA, ErrUnknown)
}

func TestFirstRequestMayBeFasterThanTheWatch(t *testing.T) {
	b := newBed(t, func(c *ResolverConfig) { c.MaxElapsed, c.MaxInterval = 20*time.Second, time.Second })
	b.api.Down() // the watch hangs back
	a := b.api.PutPod(kubeapi.NewPod(thisNode, "ns", "a", map[string]string{roleKey: "a"}))
	b.record(ipA, "c1", of(a))
	if err := b.api.Up(); err != nil {
		t.Fatal(err)
	}
	b.want(ipA, "a")
}

func TestAPIServerThatIsDownIsNotTheSameAsUnknown(t *testing.T) {
	b := newBed(t, func(c *ResolverConfig) { c.MaxElapsed, c.MaxInterval = 100*time.Millisecond, 10*time.Millisecond })
	known := b.running("known", ipB.String())
	b.record(ipB, "c2", of(known))
	b.api.Down()
	b.want(ipB, "known") // what is known is served
	b.record(ipA, "c1", attachment.Pod{Namespace: "ns", Name: "a", UID: "u"})
	b.refused(ipA, ErrUnavailable)
}

func TestPodThatTheAPIDoesNotHaveIsUnknownWithoutMoreWaiting(t *testing.T) {
	b := newBed(t, func(c *ResolverConfig) { c.MaxElapsed, c.MaxInterval = time.Hour, time.Second })
	b.record(ipA, "c1", attachment.Pod{Namespace: "ns", Name: "a", UID: "u"})
	b.refused(ipA, ErrUnknown)
}

func TestDuplicatesAreAskedForWhereTheFlagSaysSo(t *testing.T) {
	for _, ask := range []bool{false, true} {
		b := newBed(t, func(c *ResolverConfig) {
			c.AskDuplicates, c.MaxElapsed, c.MaxInterval = ask, 20*time.Second, 10*time.Millisecond
			if !ask {
				c.MaxElapsed = 50 * time.Millisecond // all of which it waits
			}
			// A watch that hangs back for good: it still shows two pods with the address.
			stale, err := NewWatch(WatchConfig{API: c.API, Node: thisNode, Keep: c.Keep, Log: slog.New(slog.DiscardHandler)})
			if err != nil {
				t.Fatal(err)
			}
			close(stale.synced)
			for _, uid := range []types.UID{"a", "b"} {
				stale.replace(uid, &Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: string(uid), UID: uid}, Node: thisNode, IPs: []netip.Addr{ipA}})
			}
			c.Watch = stale
		})
		b.running("a", ipA.String())
		if ask {
			b.want(ipA, "a")
		} else {
			b.refused(ipA, ErrAmbiguous)
		}
	}
}

// TestDuplicatesAreAskedForByEachAddress has a record whose DEL never came, and another pod that reports the address as its second.
func TestDuplicatesAreAskedForByEachAddress(t *testing.T) {
	second := netip.MustParseAddr("fd00::1")
	for _, ip := range []netip.Addr{ipA, second} {
		dir := attachment.In(t.TempDir())
		former := kubeapi.NewPod(thisNode, "ns", "former", nil)
		former.UID = "former"
		if err := dir.Put(testrecord.New("c1", of(former), ip)); err != nil {
			t.Fatal(err)
		}
		present := kubeapi.NewRunningPod(thisNode, "ns", "present", nil, ipA.String(), second.String())
		present.UID = "present"
		synctest.Test(t, func(t *testing.T) {
			api := &listing{pods: corev1.PodList{Items: []corev1.Pod{*former, *present}}}
			keep := func(string) bool { return true }
			r := NewResolver(ResolverConfig{Records: attachment.NewIndex(dir), API: api, Node: thisNode, Keep: keep, AskDuplicates: true,
				Watch: synced(t, api, fromAPI(former, keep), fromAPI(present, keep)), MaxElapsed: 50 * time.Millisecond, MaxInterval: 10 * time.Millisecond})
			if p, err := r.Resolve(t.Context(), r.Source(ip)); !errors.Is(err, ErrAmbiguous) {
				t.Errorf("%s: %v, %v", ip, p, err)
			}
		})
	}
}

// TestPodWithoutARecord has the state directory be there, and no record of an address that a pod reports: the pod came before the
// plugin. It is served as the only one that reports the address, until records were lost: then it may be a former holder's.
func TestPodWithoutARecord(t *testing.T) {
	root := filepath.Join(t.TempDir(), "state")
	b := newBed(t, func(c *ResolverConfig) { c.Records = attachment.NewIndex(attachment.In(root)) })
	b.dir = attachment.In(root)
	recorded := b.running("recorded", ipB.String())
	b.record(ipB, "c1", of(recorded))
	b.running("a", ipA.String())
	b.want(ipA, "a")
	b.want(ipB, "recorded")

	if err := os.RemoveAll(root); err != nil {
		t.Fatal(err)
	}
	b.refused(ipA, ErrUnknown)
	b.record(ipB, "c1", of(recorded))
	b.want(ipB, "recorded")
	b.refused(ipA, ErrUnknown)
}

func TestPodsWithoutARecordThatReportOneAddress(t *testing.T) {
	b := newBed(t, nil)
	b.record(ipB, "c1", of(b.running("recorded", ipB.String())))
	b.running("a", ipA.String())
	b.running("b", ipA.String())
	b.refused(ipA, ErrAmbiguous)
}

func TestUnreadableRecordIsNoReasonToBelieveTheStatus(t *testing.T) {
	root := t.TempDir()
	b := newBed(t, func(c *ResolverConfig) { c.Records = attachment.NewIndex(attachment.In(root)) })
	b.dir = attachment.In(root)
	b.running("a", ipA.String())
	b.want(ipA, "a")
	spoil(t, root, ipA)
	b.refused(ipA, ErrUnknown)
}

func TestWatcherHearsOfEachPodAndItsEnd(t *testing.T) {
	b := newBed(t, nil)
	b.running("a", ipA.String())
	if err := b.api.DeletePod("ns", "a"); err != nil {
		t.Fatal(err)
	}
	b.eventually("gone", func() bool { return b.watch.Len() == 0 })
	b.events.mu.Lock()
	defer b.events.mu.Unlock()
	if b.events.changed["a"] == 0 {
		t.Error("no word of the pod")
	}
}

func TestSuccessorOfTheSameNameEndsItsPredecessor(t *testing.T) {
	b := newBed(t, nil)
	old := b.running("a", ipA.String())
	b.api.Down() // the watch sees neither the end of the one nor the beginning of the other
	if err := b.api.DeletePod("ns", "a"); err != nil {
		t.Fatal(err)
	}
	young := b.api.PutPod(kubeapi.NewRunningPod(thisNode, "ns", "a", map[string]string{roleKey: "a"}, ipB.String()))
	b.api.Compact()
	if err := b.api.Up(); err != nil {
		t.Fatal(err)
	}
	b.seen(young)
	if b.known(old.UID) != nil || b.watch.Len() != 1 {
		t.Errorf("%d pods, the old one among them: %v", b.watch.Len(), b.known(old.UID) != nil)
	}
	b.events.mu.Lock()
	defer b.events.mu.Unlock()
	if b.events.gone["a"] != 1 {
		t.Errorf("the watcher heard of %d ends", b.events.gone["a"])
	}
	b.refused(ipA, ErrUnknown)
	b.want(ipB, "a")
}

func TestOnlyWhatIsNeededIsKept(t *testing.T) {
	b := newBed(t, nil)
	p := kubeapi.NewRunningPod(thisNode, "ns", "a", map[string]string{roleKey: "a", "other": "x"}, ipA.String())
	p = b.seen(b.api.PutPod(p))
	kept := b.known(p.UID)
	if len(kept.Annotations) != 1 || kept.Annotations[roleKey] != "a" || kept.ManagedFields != nil || kept.Labels != nil {
		t.Errorf("%+v", kept)
	}
}
