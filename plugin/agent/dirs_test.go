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
		at := t.TempDir()
		for name, text := range files {
			if err := os.WriteFile(filepath.Join(at, name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return at
	}
	const own, other = `{"type":"kube2iam-cni","stateDir":"/run/own"}`, `{"type":"kube2iam-cni","stateDir":"/run/other"}`
	chained, unchained := dir(map[string]string{"10-a.conflist": list(own)}), dir(map[string]string{"10-a.conflist": list()})
	both := dir(map[string]string{"05-b.conflist": list(own), "10-a.conflist": list(other)})
	for name, tt := range map[string]struct {
		known          []string
		conf, stateDir string
		says           string
	}{
		"its own":               {nil, chained, "/run/own", ""},
		"another's state":       {nil, chained, "/run/other", "stateDir is /run/own"},
		"one of two":            {nil, both, "/run/other", ""},
		"neither of two":        {nil, both, "/run/third", "stateDir is"},
		"nothing, nowhere":      {[]string{unchained}, unchained, "/run/own", ""},
		"nothing, but it is in": {[]string{unchained, chained}, unchained, "/run/own", "but in " + chained},
		"no directory":          {nil, filepath.Join(unchained, "none"), "/run/own", "is --cni-conf-dir where"},
	} {
		t.Run(name, func(t *testing.T) {
			cnidirs.ConfDirs = tt.known
			if err := checkDirs(tt.conf, tt.stateDir); tt.says == "" && err != nil || tt.says != "" && (err == nil || !strings.Contains(err.Error(), tt.says)) {
				t.Errorf("%v, want %q", err, tt.says)
			}
		})
	}
}
