package agent

import (
	"os"
	"path/filepath"
	"testing"
)

// TestUnknownIsNotEmpty has the records' directory unreadable for a round: nothing is taken for gone.
func TestUnknownIsNotEmpty(t *testing.T) {
	backends(t, func(t *testing.T, backend string) {
		b := newBed(t, backend)
		b.round()
		b.attached(b.pod("c1", 7, "10.1.0.5"))
		rules := b.allRules()
		dir := filepath.Join(b.node.StateDir, "attachments")
		b.must(os.Rename(dir, dir+".away"))
		b.must(os.Symlink(dir, dir)) // leads nowhere but to itself
		if err := b.Round(t.Context()); err == nil {
			t.Error("a round without records to read did not say so")
		}
		if after := b.allRules(); after != rules {
			t.Errorf("rules were changed:\n%s", after)
		}
		b.must(os.Remove(dir))
		b.must(os.Rename(dir+".away", dir))
		b.round()
		if after := b.allRules(); after != rules {
			t.Errorf("rules afterwards:\n%s", after)
		}
	})
}
