package pods

import (
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/kube2iam-cni/kube2iam-cni/test/kubeapi"
)

func TestWatcherReceivesEachPodAndItsEnd(t *testing.T) {
	h := newHarness(t, nil)
	h.running("a", ipA.String())
	if err := h.api.DeletePod("ns", "a"); err != nil {
		t.Fatal(err)
	}
	h.eventually("deleted", func() bool {
		h.watcher.mu.Lock()
		defer h.watcher.mu.Unlock()
		return h.watcher.gone["a"] == 1
	})
	if h.watcher.changed["a"] == 0 || h.watch.Len() != 0 {
		t.Errorf("%d changes before the end, %d pods are stored", h.watcher.changed["a"], h.watch.Len())
	}
}

func TestPodEndsWithItsSuccessorOfTheSameName(t *testing.T) {
	h := newHarness(t, nil)
	old := h.running("a", ipA.String())
	h.api.Down() // the watch sees neither the deletion nor the new pod
	if err := h.api.DeletePod("ns", "a"); err != nil {
		t.Fatal(err)
	}
	young := h.api.PutPod(kubeapi.NewRunningPod(thisNode, "ns", "a", map[string]string{roleKey: "a"}, ipB.String()))
	h.api.Compact()
	if err := h.api.Up(); err != nil {
		t.Fatal(err)
	}
	h.shows(young)
	h.eventually("the old pod's end", func() bool {
		h.watcher.mu.Lock()
		defer h.watcher.mu.Unlock()
		return h.watcher.gone["a"] == 1
	})
	if h.stored(old.UID) != nil || h.watch.Len() != 1 {
		t.Errorf("%d pods, the old one among them: %v", h.watch.Len(), h.stored(old.UID) != nil)
	}
	h.refuses(ipA, ErrUnknown)
	h.resolvesTo(ipB, "a")
}

func TestOnlyNeededFieldsAreStored(t *testing.T) {
	h := newHarness(t, nil)
	p := kubeapi.NewRunningPod(thisNode, "ns", "a", map[string]string{roleKey: "a", "other": "x"}, ipA.String())
	stored := h.stored(h.put(p).UID)
	if len(stored.Annotations) != 1 || stored.Annotations[roleKey] != "a" || stored.ManagedFields != nil || stored.Labels != nil {
		t.Errorf("%+v", stored)
	}
}

func TestAddressesAreIndexedWhileThePodRuns(t *testing.T) {
	w := syncedWatch(new(hangingAPI), reporter("a", ipA, ipB))
	check := func(state string, a, b int) {
		t.Helper()
		if gotA, gotB := len(w.reporting(ipA)), len(w.reporting(ipB)); gotA != a || gotB != b {
			t.Errorf("%s: %d and %d pods report the addresses, want %d and %d", state, gotA, gotB, a, b)
		}
	}
	check("running", 1, 1)
	w.put(reporter("a", ipB))
	check("without one of them", 0, 1)
	finished := reporter("a", ipB)
	finished.Finished = true
	w.put(finished)
	check("finished", 0, 0)
	w.put(reporter("a", ipA))
	w.remove(reporter("a"))
	check("deleted", 0, 0)
}

func TestAPIServersWithoutPodIPs(t *testing.T) {
	p := kubeapi.NewRunningPod(thisNode, "ns", "a", nil, ipA.String())
	p.Status.PodIP, p.Status.PodIPs = ipA.String(), nil
	if got := fromAPI(p, func(string) bool { return false }).IPs; len(got) != 1 || got[0] != ipA {
		t.Errorf("podIP only: %v", got)
	}
	p.Status.PodIPs = []corev1.PodIP{{IP: ipA.String()}, {IP: "fd00::5"}, {IP: "x"}}
	if got := fromAPI(p, func(string) bool { return false }).IPs; len(got) != 2 || got[0] != ipA {
		t.Errorf("podIPs: %v", got)
	}
}
