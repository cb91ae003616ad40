package attach

import (
	"os"
	"path/filepath"
	"testing"
)

// TestDetachAfterAKilledADD starts from the temporary record and the address of an ADD that was
// killed before it named the record and made rules. DEL removes both.
func TestDetachAfterAKilledADD(t *testing.T) {
	b := newBed(t, "nftables")
	b.attached(b.pod("c1", 7, "10.1.0.5"))
	dir := filepath.Join(b.StateDir, "attachments")
	record := filepath.Join(dir, "c1@eth0.json")
	b.Must(os.Link(record, filepath.Join(b.StateDir, "kept")))
	b.Must(b.Detach(t.Context(), "c1", "eth0"))
	temporary := filepath.Join(dir, ".c1@eth0.json.tmp")
	address := filepath.Join(b.StateDir, "by-ip", "10.1.0.5")
	b.Must(os.Rename(filepath.Join(b.StateDir, "kept"), temporary))
	b.Must(os.Link(temporary, address))
	b.Must(b.Detach(t.Context(), "c1", "eth0"))
	for _, file := range []string{temporary, address} {
		if _, err := os.Lstat(file); !os.IsNotExist(err) {
			t.Errorf("%s: %v, want that it is removed", file, err)
		}
	}
}
