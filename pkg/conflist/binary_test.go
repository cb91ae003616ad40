package conflist

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"testing"
)

func TestBinaryIsReplacedIfItDiffers(t *testing.T) {
	n := newNode(t, map[string]string{"10-a.conflist": chain("a", "bridge")})
	path := filepath.Join(n.BinDir, plugin)
	n.must(os.WriteFile(path, []byte("older"), 0o755))
	running, err := os.Open(path)
	n.must(err)
	defer running.Close()
	for _, tt := range []struct {
		name   string
		change func() error
	}{
		{"another size", func() error { return nil }},
		{"the same size", func() error { return os.WriteFile(path, bytes.Repeat([]byte("x"), len(binary)), 0o755) }},
		{"not executable", func() error { return os.Chmod(path, 0o644) }},
		{"removed", func() error { return os.Remove(path) }},
	} {
		n.must(tt.change())
		if changes, err := n.Install(); err != nil || len(changes) == 0 {
			t.Fatalf("%s: changes %q, error %v", tt.name, changes, err)
		}
		if text, err := os.ReadFile(path); err != nil || string(text) != binary {
			t.Errorf("%s: %q, %v", tt.name, text, err)
		}
	}
	if text, err := io.ReadAll(running); string(text) != "older" {
		t.Errorf("the file of a running plugin changed: %q, %v", text, err)
	}
}
