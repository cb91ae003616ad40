package rules

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/nft"
)

// pods are a routed and a bridged pod of both IP families.
func pods() []*attachment.Record {
	return []*attachment.Record{routed("c1", "veth0", "10.1.0.5", "fd00:1::5"), bridged("c2", "veth1", "10.1.0.6", "fd00:1::6")}
}

// TestReconcile damages the rules of two pods. A dry run returns the changes and makes none; then
// one transaction repairs all.
func TestReconcile(t *testing.T) {
	for name, tc := range map[string]struct {
		damage string
		want   []string // the changes, or some of them where there are more than three
	}{
		"a flush of everything": {"flush ruleset", []string{
			"missing: rules of chain guard of table ip kube2iam-cni", "missing: rules of chain prerouting of table bridge kube2iam-cni",
			"missing: redirection of 10.1.0.5 to 192.168.7.2:8181 of c1@eth0 in set routed of table ip kube2iam-cni",
			"missing: binding of 10.1.0.6 to veth1 of c2@eth0 in set bound4 of table bridge kube2iam-cni"}},
		"a deleted table": {"delete table ip kube2iam-cni", []string{"missing: rules of chain redirections of table ip kube2iam-cni"}},
		"a deleted redirection": {"delete element ip kube2iam-cni routed { veth0 . 10.1.0.5 }", []string{
			"missing: redirection of 10.1.0.5 to 192.168.7.2:8181 of c1@eth0 in set routed of table ip kube2iam-cni"}},
		"a deleted binding": {"flush set bridge kube2iam-cni ports6", []string{
			"missing: binding of fd00:1::6 to veth1 of c2@eth0 in set ports6 of table bridge kube2iam-cni"}},
		"a redirection elsewhere": {`delete element ip kube2iam-cni routed { veth0 . 10.1.0.5 }
			add element ip kube2iam-cni routed { veth0 . 10.1.0.5 comment "c1@eth0" : 192.168.7.3 . 8181 }`, []string{
			"stale: entry of c1@eth0 in set routed of table ip kube2iam-cni",
			"missing: redirection of 10.1.0.5 to 192.168.7.2:8181 of c1@eth0 in set routed of table ip kube2iam-cni"}},
		"a redirection of another": {`delete element ip kube2iam-cni bridged { 10.1.0.6 }
			add element ip kube2iam-cni bridged { 10.1.0.6 comment "c9@eth0" : 192.168.7.2 . 8181 }`, []string{
			"stale: entry of c9@eth0 in set bridged of table ip kube2iam-cni",
			"missing: redirection of 10.1.0.6 to 192.168.7.2:8181 of c2@eth0 in set bridged of table ip kube2iam-cni"}},
		"a pod without a record": {`add element ip kube2iam-cni routed { veth9 . 10.1.0.9 comment "c9@eth0" : 192.168.7.2 . 8181 }`, []string{
			"stale: entry of c9@eth0 in set routed of table ip kube2iam-cni"}},
		"a table of a killed probe": {"add table bridge " + nft.ProbePrefix + "1", []string{"stale: table bridge " + nft.ProbePrefix + "1"}},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			for _, r := range pods() {
				h.must(h.Attach(t.Context(), r, nil))
			}
			whole := h.ruleset()
			h.nftScript(tc.damage)
			damaged := h.ruleset()
			for _, dryRun := range []bool{true, false} {
				changes, err := h.Reconcile(t.Context(), pods(), attachment.BackendNFTables, dryRun)
				h.must(err)
				got := changeStrings(changes)
				if missing := slices.DeleteFunc(slices.Clone(tc.want), func(c string) bool { return slices.Contains(got, c) }); len(missing) > 0 {
					t.Errorf("dryRun %v: no %q in %q", dryRun, missing, got)
				}
				if len(got) <= 3 && len(got) != len(tc.want) {
					t.Errorf("dryRun %v: got %q, want %q", dryRun, got, tc.want)
				}
				if dryRun {
					h.wantRuleset("after a dry run", damaged)
				}
			}
			h.wantRuleset("after Reconcile", whole)
			h.wantTransactions("a second Reconcile", 0, func() {
				changes, err := h.Reconcile(t.Context(), pods(), attachment.BackendNFTables, false)
				h.must(err)
				if len(changes) > 0 {
					t.Errorf("a second Reconcile: %v", changes)
				}
			})
		})
	}
}

// TestReconcileOfManyPods makes the rules of a full node in one transaction, and removes them in
// one.
func TestReconcileOfManyPods(t *testing.T) {
	h := newHost(t)
	records := pods()
	_, err := h.Reconcile(t.Context(), records, attachment.BackendNFTables, false)
	h.must(err)
	whole := h.ruleset()
	for i := range 300 {
		records = append(records, routed(fmt.Sprint("d", i), fmt.Sprint("veth", 100+i), fmt.Sprintf("10.2.%d.%d", i/100, 1+i%100)))
	}
	for _, count := range []int{302, 2} {
		h.wantTransactions("Reconcile", 1, func() {
			changes, err := h.Reconcile(t.Context(), records[:count], attachment.BackendNFTables, false)
			h.must(err)
			if len(changes) != 300 {
				t.Errorf("%d changes, want 300", len(changes))
			}
		})
	}
	h.wantRuleset("in the end", whole)
}

// TestReconcileOfAThousandBridgedPods makes all their rules in one transaction, with the longest
// names.
func TestReconcileOfAThousandBridgedPods(t *testing.T) {
	h := newHost(t)
	var records []*attachment.Record
	for i := range 1000 {
		container := strings.Repeat("c", 60) + fmt.Sprintf("%04d", i)
		records = append(records, bridged(container, fmt.Sprintf("veth%011d", i), fmt.Sprintf("10.2.%d.%d", i/200, 1+i%200), fmt.Sprintf("fd00:2::%x", 1+i)))
	}
	h.wantTransactions("Reconcile", 1, func() {
		_, err := h.Reconcile(t.Context(), records, attachment.BackendNFTables, false)
		h.must(err)
	})
	changes, err := h.Reconcile(t.Context(), records, attachment.BackendNFTables, true)
	h.must(err)
	if len(changes) > 0 {
		t.Errorf("%d changes after Reconcile, the first: %s", len(changes), changes[0])
	}
}

// TestReconcileLeavesOtherOwners has elements of other owners in the maps: only those of
// attachments are removed.
func TestReconcileLeavesOtherOwners(t *testing.T) {
	h := newHost(t)
	_, err := h.Reconcile(t.Context(), pods(), attachment.BackendNFTables, false)
	h.must(err)
	h.nftScript(`add element ip kube2iam-cni routed { veth8 . 10.1.0.8 : 192.168.7.2 . 8181, veth9 . 10.1.0.9 comment "other" : 192.168.7.2 . 8181 }`)
	before := h.ruleset()
	_, err = h.Reconcile(t.Context(), pods(), attachment.BackendNFTables, false)
	h.must(err)
	h.wantRuleset("after Reconcile", before)
}

// TestGuardIsNeverRemoved has two network configurations on one node: the one without the guard
// does not remove that of the other.
func TestGuardIsNeverRemoved(t *testing.T) {
	h := newHost(t)
	h.Guard = false
	h.must(h.Attach(t.Context(), bridged("c1", "veth0", "10.1.0.5"), nil))
	if strings.Contains(h.ruleset(), "chain guard") {
		t.Error("a guard without the setting")
	}
	h.Guard = true
	h.must(h.Attach(t.Context(), bridged("c2", "veth1", "10.1.0.6"), nil))
	guards := strings.Count(h.ruleset(), "chain guard")
	h.Guard = false
	h.must(h.Attach(t.Context(), bridged("c3", "veth2", "10.1.0.7"), nil))
	_, err := h.Reconcile(t.Context(), []*attachment.Record{bridged("c3", "veth2", "10.1.0.7")}, attachment.BackendNFTables, false)
	h.must(err)
	if now := strings.Count(h.ruleset(), "chain guard"); guards != 5 || now != guards {
		t.Errorf("%d guard chains, then %d; want 5", guards, now)
	}
}
