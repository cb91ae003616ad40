package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestInstallWaitsForRecentInvalidFile has a file that was written a moment ago and stays invalid.
func TestInstallWaitsForRecentInvalidFile(t *testing.T) {
	n := newNode(t, "auto")
	n.Must(os.WriteFile(filepath.Join(n.conf, "05-x.conflist"), []byte("{"), 0o644))
	if got := n.command("install"); got.Code != 0 || !strings.Contains(got.Stdout, "entry in "+n.conf+"/10-pods.conflist") {
		t.Errorf("install: %+v", got)
	}
}

func TestInstallErrors(t *testing.T) {
	n := newNode(t, "auto")
	n.Must(os.Remove(filepath.Join(n.conf, "10-pods.conflist")))
	if got := n.command("install"); got.Code != 1 || !strings.Contains(got.Stderr, "the primary CNI has to be installed first") {
		t.Errorf("without a network: %+v", got)
	}
	if got := n.command("install", "--proxy-port", "0"); got.Code != 1 || !strings.Contains(got.Stderr, "proxyPort") {
		t.Errorf("an invalid key: %+v", got)
	}
	if got := n.command("install", "--host-root", "/nowhere"); got.Code != 1 || !strings.Contains(got.Stderr, "--host-root /nowhere") {
		t.Errorf("a host root that does not exist: %+v", got)
	}
	n.Must(os.RemoveAll(n.bin))
	if got := n.command("install"); got.Code != 1 || !strings.Contains(got.Stderr, "the plugin's program") {
		t.Errorf("without a directory of plugins: %+v", got)
	}
}
