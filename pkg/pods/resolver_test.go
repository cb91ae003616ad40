package pods

import (
	"net/netip"
	"os"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/test/kubeapi"
)

func TestRecordResolvesAPodWithoutStatus(t *testing.T) {
	h := newHarness(t, nil)
	a := h.pending("a")
	h.refuses(ipA, ErrUnknown)
	if holder := h.resolver.Source(ipA).Holder(); holder != "" {
		t.Errorf("held by %q without a record", holder)
	}
	h.record(ipA, "c1", recordOf(a))
	h.resolvesTo(ipA, "a")
	if holder := h.resolver.Source(ipA).Holder(); holder != string(a.UID) {
		t.Errorf("held by %q", holder)
	}
}

func TestStatusResolvesAPodWithoutRecord(t *testing.T) {
	h := newHarness(t, nil)
	h.running("a", ipA.String(), "fd00::5")
	h.resolvesTo(ipA, "a")
	h.resolvesTo(netip.MustParseAddr("fd00::5"), "a")
}

func TestReusedAddressBelongsToTheNewPodAtOnce(t *testing.T) {
	h := newHarness(t, nil)
	old := h.running("old", ipA.String())
	h.record(ipA, "c1", recordOf(old))
	h.resolvesTo(ipA, "old")
	// The old pod completes. Its address goes to a pod that does not report it yet.
	if err := h.api.SetStatus("ns", "old", corev1.PodSucceeded, ipA.String()); err != nil {
		t.Fatal(err)
	}
	h.eventually("finished", func() bool { return h.stored(old.UID).Finished })
	h.refuses(ipA, ErrFinished)
	young := h.pending("young")
	h.record(ipA, "c2", recordOf(young))
	h.resolvesTo(ipA, "young")
	if err := h.api.SetStatus("ns", "young", corev1.PodRunning, ipA.String()); err != nil {
		t.Fatal(err)
	}
	h.eventually("status", func() bool { return len(h.stored(young.UID).IPs) == 1 })
	h.resolvesTo(ipA, "young")
}

// TestRecordIsRefusedIfAnotherRunningPodReportsTheAddress has a record whose DEL never came.
func TestRecordIsRefusedIfAnotherRunningPodReportsTheAddress(t *testing.T) {
	h := newHarness(t, nil)
	former := h.running("former", ipB.String())
	h.record(ipA, "c1", recordOf(former))
	h.running("holder", ipA.String())
	h.refuses(ipA, ErrAmbiguous)
}

func TestRecordOfAnotherPodIsRefused(t *testing.T) {
	for name, recorded := range map[string]attachment.Pod{
		"another name":      {Namespace: "ns", Name: "b", UID: "a"},
		"another namespace": {Namespace: "other", Name: "a", UID: "a"},
		"another UID":       {Namespace: "ns", Name: "a", UID: "an-earlier-a"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			putRecord(t, dir, "c", recorded, ipA)
			h := &harness{t: t, resolver: NewResolver(ResolverConfig{
				Records: attachment.NewIndex(attachment.In(dir)), Watch: syncedWatch(new(hangingAPI), reporter("a", ipA)),
			})}
			h.refuses(ipA, ErrUnknown)
		})
	}
}

func TestRecordWithoutUIDNeedsAPodThatReportsTheAddress(t *testing.T) {
	h := newHarness(t, nil)
	a := h.pending("a")
	h.record(ipA, "c1", attachment.Pod{Namespace: a.Namespace, Name: a.Name})
	h.refuses(ipA, ErrUnknown)
	if err := h.api.SetStatus("ns", "a", corev1.PodRunning, ipA.String()); err != nil {
		t.Fatal(err)
	}
	h.eventually("status", func() bool { return len(h.stored(a.UID).IPs) == 1 })
	h.resolvesTo(ipA, "a")
}

// TestDeletedPodNeedsARecord has a pod whose deletion has begun: its DEL may have released the
// address to another pod.
func TestDeletedPodNeedsARecord(t *testing.T) {
	h := newHarness(t, nil)
	p := kubeapi.NewRunningPod(thisNode, "ns", "a", map[string]string{roleKey: "a"}, ipA.String())
	now := metav1.Now()
	p.DeletionTimestamp, p.Finalizers = &now, []string{"test/wait"}
	p = h.put(p)
	h.refuses(ipA, ErrUnknown)
	h.record(ipA, "c1", recordOf(p))
	h.resolvesTo(ipA, "a")
}

func TestNoPodIsResolvedBeforeTheListIsComplete(t *testing.T) {
	for name, tt := range map[string]struct {
		records *attachment.Index
		elapsed time.Duration
	}{
		"with a record":    {records: recordOfA(t)},
		"without a record": {records: noRecords(t)},
		"after a wait":     {records: recordOfA(t), elapsed: time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			api := &answeringAPI{pods: map[string]*corev1.Pod{"a": kubeapi.NewRunningPod(thisNode, "ns", "a", nil, ipA.String())}}
			api.pods["a"].UID = "a"
			w := unsyncedWatch(api, reporter("a", ipA))
			h := &harness{t: t, resolver: NewResolver(ResolverConfig{Records: tt.records, Watch: w, MaxElapsed: tt.elapsed})}
			h.refuses(ipA, ErrUnavailable)
			w.sync()
			h.resolvesTo(ipA, "a")
		})
	}
}

func TestStaticPodIsResolvedToItsMirrorPod(t *testing.T) {
	h := newHarness(t, nil)
	h.put(kubeapi.NewPod(thisNode, "ns", "static", map[string]string{roleKey: "static", corev1.MirrorPodAnnotationKey: "hash-of-the-manifest"}))
	h.record(ipA, "c1", attachment.Pod{Namespace: "ns", Name: "static", UID: "hash-of-the-manifest"})
	h.resolvesTo(ipA, "static")
	// The same annotation on another pod does not give it the address.
	h.put(kubeapi.NewPod(thisNode, "ns", "thief", map[string]string{roleKey: "thief", corev1.MirrorPodAnnotationKey: "hash-of-the-manifest"}))
	h.resolvesTo(ipA, "static")
}

func TestAddressOfAContainerThatIsNoPodIsRefused(t *testing.T) {
	h := newHarness(t, nil)
	h.running("a", ipA.String())
	h.record(ipA, "c1", attachment.Pod{})
	h.refuses(ipA, ErrNotAPod)
}

func TestAddressThatTwoPodsReportIsRefused(t *testing.T) {
	h := newHarness(t, nil)
	h.record(ipB, "c1", recordOf(h.running("recorded", ipB.String())))
	h.running("a", ipA.String())
	h.running("b", ipA.String())
	h.refuses(ipA, ErrAmbiguous)
	if err := h.api.DeletePod("ns", "b"); err != nil {
		t.Fatal(err)
	}
	h.eventually("deleted", func() bool { return h.watch.Len() == 2 })
	h.resolvesTo(ipA, "a")
}

func TestPodOnTheHostsNetworkHasNoAddress(t *testing.T) {
	h := newHarness(t, nil)
	p := kubeapi.NewRunningPod(thisNode, "ns", "host", map[string]string{roleKey: "host"}, ipA.String())
	p.Spec.HostNetwork = true
	p = h.put(p)
	h.refuses(ipA, ErrUnknown)
	h.record(ipA, "c1", recordOf(p))
	h.refuses(ipA, ErrUnknown)
}

func TestPodOfAnotherNodeIsRefused(t *testing.T) {
	h := newHarness(t, func(c *ResolverConfig) { c.MaxElapsed, c.MaxInterval = time.Hour, time.Second })
	p := h.api.PutPod(kubeapi.NewRunningPod("node-2", "ns", "far", map[string]string{roleKey: "far"}, ipA.String()))
	h.record(ipA, "c1", recordOf(p))
	h.refuses(ipA, ErrUnknown)
}

// TestPodWithoutARecordIsServedUntilRecordsAreLost has a pod that is older than the plugin. It is
// the only one that reports the address. After the records were removed, the address may have
// another holder.
func TestPodWithoutARecordIsServedUntilRecordsAreLost(t *testing.T) {
	h := newHarness(t, nil)
	recorded := h.running("recorded", ipB.String())
	h.record(ipB, "c1", recordOf(recorded))
	h.running("a", ipA.String())
	h.resolvesTo(ipA, "a")
	h.resolvesTo(ipB, "recorded")

	if err := os.RemoveAll(h.dir); err != nil {
		t.Fatal(err)
	}
	h.refuses(ipA, ErrUnknown)
	h.record(ipB, "c1", recordOf(recorded))
	h.resolvesTo(ipB, "recorded")
	h.refuses(ipA, ErrUnknown)
}

func TestStatusDoesNotReplaceAnUnreadableRecord(t *testing.T) {
	h := newHarness(t, nil)
	h.running("a", ipA.String())
	h.resolvesTo(ipA, "a")
	putUnreadableRecord(t, h.dir, ipA)
	h.refuses(ipA, ErrUnknown)
}
