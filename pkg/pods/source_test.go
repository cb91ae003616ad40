package pods

import (
	"testing"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
)

func TestSourceIsTheSameForOneHolder(t *testing.T) {
	h := newHarness(t, nil)
	source := func(container, uid string) Source {
		h.record(ipA, container, attachment.Pod{Namespace: "ns", Name: "a", UID: uid})
		return h.resolver.Source(ipA)
	}
	first := source("c1", "a")
	for name, tt := range map[string]struct {
		now  Source
		want bool
	}{
		"the same record":              {source("c1", "a"), true},
		"the pod's next sandbox":       {source("c2", "a"), true},
		"a pod of the same name":       {source("c1", "b"), false},
		"a record without UID":         {source("c1", ""), false},
		"an address without a holder":  {h.resolver.Source(ipB), false},
		"a record that is not read":    {Source{IP: ipA, err: ErrUnknown}, false},
		"the pod, reported, no record": {Source{IP: ipA, reported: "a"}, true},
	} {
		if got := first.Same(tt.now); got != tt.want {
			t.Errorf("%s: %t", name, got)
		}
	}
	if unread := (Source{IP: ipA, err: ErrUnknown}); unread.Same(unread) {
		t.Error("two records that are not read: true")
	}
	if (Source{IP: ipA}).Same(first) {
		t.Error("a record where there was no holder: true")
	}
}

// TestSourceWithoutRecords moves the address from one pod that reports it to another.
func TestSourceWithoutRecords(t *testing.T) {
	w := syncedWatch(new(hangingAPI))
	r := NewResolver(ResolverConfig{Records: noRecords(t), Watch: w})
	before := r.Source(ipA)
	w.put(reporter("a", ipA))
	first := r.Source(ipA)
	if !before.Same(first) || !first.Same(r.Source(ipA)) {
		t.Error("the same holder counts as another")
	}
	w.remove(reporter("a"))
	if first.Same(r.Source(ipA)) {
		t.Error("an address without a holder counts as the holder's")
	}
	w.put(reporter("b", ipA))
	if first.Same(r.Source(ipA)) {
		t.Error("another holder counts as the same")
	}
}

func TestAddressThatTwoPodsReportHasNoHolder(t *testing.T) {
	w := syncedWatch(new(hangingAPI), reporter("a", ipA), reporter("b", ipA))
	r := NewResolver(ResolverConfig{Records: noRecords(t), Watch: w})
	if holder := r.Source(ipA).Holder(); holder != "" {
		t.Errorf("%q", holder)
	}
}

// TestHolderOfAStaticPodIsTheKubeletsUID matches what the attachment record has.
func TestHolderOfAStaticPodIsTheKubeletsUID(t *testing.T) {
	static := reporter("mirror", ipA)
	static.Mirror = "static"
	r := NewResolver(ResolverConfig{Records: noRecords(t), Watch: syncedWatch(new(hangingAPI), static)})
	if holder := r.Source(ipA).Holder(); holder != "static" {
		t.Errorf("%q", holder)
	}
}

// TestIdentity checks that holders of an address differ, and that a record changes nothing for the
// pod that reported the address before.
func TestIdentity(t *testing.T) {
	h := newHarness(t, nil)
	identity := func() string { return h.resolver.Source(ipA).Identity() }
	if got := identity(); got != "" {
		t.Errorf("without a holder: %q", got)
	}
	a := h.running("a", ipA.String())
	reported := identity()
	h.record(ipA, "c1", recordOf(a))
	if recorded := identity(); reported == "" || recorded != reported {
		t.Errorf("%q while the pod reports the address, %q with its record", reported, recorded)
	}
	h.record(ipA, "c2", attachment.Pod{Namespace: "ns", Name: "a"})
	second := identity()
	h.record(ipA, "c3", attachment.Pod{Namespace: "ns", Name: "a"})
	third := identity()
	if second == "" || third == "" || second == third || second == reported {
		t.Errorf("without UIDs, one pod is %q and the next %q", second, third)
	}
	putUnreadableRecord(t, h.dir, ipA)
	if got := identity(); got == "" || got == reported || got == third {
		t.Errorf("with an unreadable record: %q", got)
	}
}
