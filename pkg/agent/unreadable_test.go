package agent

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/kube2iam-cni/kube2iam-cni/test/testhost"
)

// TestUnknownIsNotEmpty has an unreadable directory of records: no attachment is collected.
func TestUnknownIsNotEmpty(t *testing.T) {
	testhost.Backends(t, func(t *testing.T, backend string) {
		b := newBed(t, backend)
		b.round()
		b.attached(b.pod("c1", 7, "10.1.0.5"))
		rules := b.AllRules()
		dir := filepath.Join(b.node.StateDir, "attachments")
		b.Must(os.Rename(dir, dir+".away"))
		b.Must(os.Symlink(dir, dir)) // leads nowhere but to itself
		if err := b.Round(t.Context()); err == nil {
			t.Error("a round without records to read did not say so")
		}
		if after := b.AllRules(); after != rules {
			t.Errorf("rules were changed:\n%s", after)
		}
		b.Must(os.Remove(dir))
		b.Must(os.Rename(dir+".away", dir))
		b.round()
		if after := b.AllRules(); after != rules {
			t.Errorf("rules afterwards:\n%s", after)
		}
	})
}
