package conflist

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// testNode is a node's directories and an installer for them.
type testNode struct {
	*Installer
	t *testing.T
}

const binary = "#!/bin/true\nthe plugin\n"

func newNode(t *testing.T, files map[string]string) *testNode {
	t.Helper()
	root := t.TempDir()
	n := &testNode{t: t, Installer: &Installer{
		ConfDir: filepath.Join(root, "net.d"), BinDir: filepath.Join(root, "bin"), Interval: time.Hour, Log: slog.New(slog.DiscardHandler),
		Binary: Binary{Name: plugin, Source: strings.NewReader(binary), Size: int64(len(binary))}, Entry: []byte(entry),
	}}
	n.must(errors.Join(os.Mkdir(n.ConfDir, 0o755), os.Mkdir(n.BinDir, 0o755)))
	for name, text := range files {
		n.write(name, text)
	}
	return n
}

func (n *testNode) must(err error) {
	n.t.Helper()
	if err != nil {
		n.t.Fatal(err)
	}
}

func (n *testNode) path(name string) string { return filepath.Join(n.ConfDir, name) }

// write writes a configuration in place, with a modification time an hour ago.
func (n *testNode) write(name, text string) {
	n.t.Helper()
	path := n.path(name)
	earlier := time.Now().Add(-time.Hour)
	n.must(os.MkdirAll(filepath.Dir(path), 0o755))
	n.must(os.WriteFile(path, []byte(text), 0o640))
	n.must(os.Chtimes(path, earlier, earlier))
}

// rename writes a configuration as most CNIs do: to another name, and then renames it.
func (n *testNode) rename(name, text string) {
	n.t.Helper()
	temporary := n.path(name + ".tmp")
	n.must(errors.Join(os.WriteFile(temporary, []byte(text), 0o600), os.Rename(temporary, n.path(name))))
}

// files returns the content of the files in the configuration directory, without subdirectories.
func (n *testNode) files() map[string]string {
	n.t.Helper()
	entries, err := os.ReadDir(n.ConfDir)
	n.must(err)
	files := make(map[string]string)
	for _, e := range entries {
		if e.IsDir() {
			continue
		}
		text, err := os.ReadFile(n.path(e.Name()))
		n.must(err)
		files[e.Name()] = string(text)
	}
	return files
}

func (n *testNode) wantFiles(want map[string]string) {
	n.t.Helper()
	if diff := cmp.Diff(want, n.files()); diff != "" {
		n.t.Errorf("files (-want +got):\n%s", diff)
	}
}
