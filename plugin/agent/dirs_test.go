package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/cnidirs"
)

// TestCheckDirs covers a plugin that is chained in another directory, and entries with two state
// directories, which an upgrade of the primary CNI can leave.
func TestCheckDirs(t *testing.T) {
	known := cnidirs.ConfDirs
	defer func() { cnidirs.ConfDirs = known }()
	list := func(entries ...string) string {
		return `{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"bridge"}` + strings.Join(append([]string{""}, entries...), ",") + `]}`
	}
	dir := func(files map[string]string) string {
		path := t.TempDir()
		for name, text := range files {
			if err := os.WriteFile(filepath.Join(path, name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return path
	}
	const entry, other = `{"type":"kube2iam-cni","stateDir":"/run/entry"}`, `{"type":"kube2iam-cni","stateDir":"/run/other"}`
	chained, unchained := dir(map[string]string{"10-a.conflist": list(entry)}), dir(map[string]string{"10-a.conflist": list()})
	both := dir(map[string]string{"05-b.conflist": list(entry), "10-a.conflist": list(other)})
	for name, tt := range map[string]struct {
		known          []string
		conf, stateDir string
		message        string
	}{
		"the entry's directory":        {nil, chained, "/run/entry", ""},
		"another state directory":      {nil, chained, "/run/other", "stateDir is /run/entry"},
		"one of two entries":           {nil, both, "/run/other", ""},
		"neither of two entries":       {nil, both, "/run/third", "stateDir is"},
		"not chained":                  {[]string{unchained}, unchained, "/run/entry", ""},
		"chained in another directory": {[]string{unchained, chained}, unchained, "/run/entry", "but in " + chained},
		"no configuration directory":   {nil, filepath.Join(unchained, "none"), "/run/entry", "is --cni-conf-dir where"},
	} {
		t.Run(name, func(t *testing.T) {
			cnidirs.ConfDirs = tt.known
			if err := checkDirs(tt.conf, tt.stateDir); tt.message == "" && err != nil || tt.message != "" && (err == nil || !strings.Contains(err.Error(), tt.message)) {
				t.Errorf("%v, want %q", err, tt.message)
			}
		})
	}
}
