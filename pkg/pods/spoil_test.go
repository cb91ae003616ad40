package pods

import (
	"net/netip"
	"os"
	"path/filepath"
	"testing"
)

// spoil puts something unreadable in the place of the record of an address.
func spoil(t *testing.T, root string, ip netip.Addr) {
	t.Helper()
	if err := os.MkdirAll(filepath.Join(root, "by-ip"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "by-ip", ip.String()), []byte("{"), 0o644); err != nil {
		t.Fatal(err)
	}
}
