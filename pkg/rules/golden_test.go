package rules

import (
	"flag"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
)

var update = flag.Bool("update", false, "rewrite the files in testdata")

// TestRulesets compares whole rulesets with the files in testdata, which docs/architecture.md
// shows.
func TestRulesets(t *testing.T) {
	dual := []string{"10.1.0.5", "fd00:1::5"}
	for name, tc := range map[string]struct {
		records []*attachment.Record
		noGuard bool
	}{
		"guard":            {},
		"routed":           {records: []*attachment.Record{routed("pod", "veth1", "10.1.0.5")}},
		"routed-dual":      {records: []*attachment.Record{routed("pod", "veth1", dual...)}},
		"routed-unguarded": {records: []*attachment.Record{routed("pod", "veth1", "10.1.0.5")}, noGuard: true},
		"bridged":          {records: []*attachment.Record{bridged("pod", "veth1", "10.1.0.5")}},
		"bridged-dual":     {records: []*attachment.Record{bridged("pod", "veth1", dual...)}},
		"bridged-unguarded": {
			records: []*attachment.Record{bridged("pod", "veth1", "10.1.0.5")}, noGuard: true},
		"mixed": {records: []*attachment.Record{routed("a", "veth1", "10.1.0.5"), bridged("b", "veth2", "10.2.0.5")}},
		"pod":   {records: []*attachment.Record{record("pod", attachment.DatapathPod, "", "10.1.0.5")}},
	} {
		t.Run(name, func(t *testing.T) {
			for how, program := range map[string]func(*host){
				"Attach": func(h *host) {
					for _, r := range tc.records {
						h.must(h.Attach(t.Context(), r, nil))
					}
					if len(tc.records) == 0 {
						_, err := h.Reconcile(t.Context(), nil, attachment.BackendNFTables, false)
						h.must(err)
					}
				},
				"Reconcile": func(h *host) {
					_, err := h.Reconcile(t.Context(), tc.records, attachment.BackendNFTables, false)
					h.must(err)
				},
			} {
				h := newHost(t)
				h.Guard = !tc.noGuard
				program(h)
				got, file := h.ruleset(), filepath.Join("testdata", name+".nft")
				if *update {
					h.must(os.WriteFile(file, []byte(got), 0o644))
				}
				want, err := os.ReadFile(file)
				h.must(err)
				if diff := cmp.Diff(string(want), got); diff != "" {
					t.Errorf("%s (-want +got):\n%s", how, diff)
				}
				for _, r := range tc.records {
					changes, err := h.Check(t.Context(), r)
					h.must(err)
					if len(changes) > 0 {
						t.Errorf("Check after %s: %v", how, changes)
					}
				}
				h.wantTransactions("a second "+how, 0, func() { program(h) })
			}
		})
	}
}
