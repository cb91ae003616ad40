package conflist

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containernetworking/cni/libcni"
)

// TestWhatRuntimesPassOverIsPassedOver compares what makes sense here with what makes sense to libcni, by which runtimes read.
func TestWhatRuntimesPassOverIsPassedOver(t *testing.T) {
	texts := []string{
		``, `{`, `[]`, `null`, `"x"`, `{}`, `{"name":"x"}`, `{"name":"x","plugins":null}`, `{"name":"x","plugins":[]}`, `{"name":"x","plugins":{}}`,
		`{"name":"x","plugins":[{}]}`, `{"name":"x","plugins":[null]}`, `{"name":"x","plugins":["bridge"]}`, `{"name":"x","plugins":[{"type":""}]}`,
		`{"name":"x","plugins":[{"type":"bridge"}]}`, `{"name":"x","plugins":[{"type":"bridge"},{"type":""}]}`, `{"name":"x","plugins":[{"Type":"bridge"}]}`,
		`{"name":"x","Plugins":[{"type":"bridge"}]}`, `{"Name":"x","plugins":[{"type":"bridge"}]}`, `{"plugins":[{"type":"bridge"}]}`,
		`{"name":"","plugins":[{"type":"bridge"}]}`, `{"name":1,"plugins":[{"type":"bridge"}]}`, `{"name":null,"plugins":[{"type":"bridge"}]}`,
		`{"cniVersion":1,"name":"x","plugins":[{"type":"bridge"}]}`, `{"cniVersion":"x","name":"x","plugins":[{"type":"bridge"}]}`,
		`{"cniVersion":null,"name":"x","plugins":[{"type":"bridge"}]}`, `{"cniVersion":"9.0.0","name":"x","plugins":[{"type":"bridge"}]}`,
		`{"cniVersions":["1.0.0","1.1.0"],"name":"x","plugins":[{"type":"bridge"}]}`, `{"cniVersions":"1.0.0","name":"x","plugins":[{"type":"bridge"}]}`,
		`{"cniVersions":[1],"name":"x","plugins":[{"type":"bridge"}]}`, `{"cniVersions":["x"],"name":"x","plugins":[{"type":"bridge"}]}`,
		`{"cniVersions":null,"name":"x","plugins":[{"type":"bridge"}]}`, `{"cniVersions":[null],"name":"x","plugins":[{"type":"bridge"}]}`,
		`{"cniVersions":["1.0.0"],"cniVersion":"y","name":"x","plugins":[{"type":"bridge"}]}`, `{"cniVersions":[],"name":"x","plugins":[{"type":"bridge"}]}`,
		`{"disableCheck":"no","name":"x","plugins":[{"type":"bridge"}]}`, `{"disableCheck":"TRUE","name":"x","plugins":[{"type":"bridge"}]}`,
		`{"disableCheck":1,"name":"x","plugins":[{"type":"bridge"}]}`, `{"disableGC":null,"name":"x","plugins":[{"type":"bridge"}]}`,
		`{"disableGC":false,"name":"x","plugins":[{"type":"bridge"}]}`, `{"loadOnlyInlinedPlugins":true,"name":"x"}`,
		`{"loadOnlyInlinedPlugins":"maybe","name":"x","plugins":[{"type":"bridge"}]}`, `{"loadOnlyInlinedPlugins":true,"name":"x","plugins":[{"type":"bridge"}]}`,
		`{"name":"x","plugins":[{"type":"bridge","ipam":"host-local"}]}`, `{"name":"x","plugins":[{"type":"bridge","ipam":{"type":1}}]}`,
		`{"name":"x","plugins":[{"type":"bridge","dns":[]}]}`, `{"name":"x","plugins":[{"type":"bridge","capabilities":{"a":1}}]}`,
		`{"name":"x","plugins":[{"type":"bridge","prevResult":[]}]}`, `{"name":"x","plugins":[{"type":1}]}`, `{"name":"x","plugins":[{"type":"bridge"}]} x`,
		`{"type":"bridge"}`, `{"type":"bridge","name":1}`, `{"type":"bridge","ipam":[]}`, `{"type":"bridge","cniVersion":2}`, `{"type":""}`,
	}
	for _, text := range texts {
		for _, name := range []string{"10-a.conflist", "10-a.conf"} {
			dir := t.TempDir()
			path := filepath.Join(dir, name)
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			var theirs error
			if filepath.Ext(name) == ".conf" {
				_, theirs = libcni.ConfFromFile(path)
			} else {
				_, theirs = libcni.ConfListFromFile(path)
			}
			if _, ours := read(path); (ours == nil) != (theirs == nil) {
				t.Errorf("%s with %s: libcni says %v, and we say %v", name, text, theirs, ours)
			}
		}
	}
	// Plugins beside a list.
	for _, beside := range []string{`{"type":"bridge"}`, `{}`, `{`, `{"type":"bridge","ipam":1}`} {
		dir := t.TempDir()
		path := filepath.Join(dir, "10-x.conflist")
		if err := os.Mkdir(filepath.Join(dir, "x"), 0o755); err != nil {
			t.Fatal(err)
		}
		for file, text := range map[string]string{path: `{"name":"x"}`, filepath.Join(dir, "x", "1.conf"): beside} {
			if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		_, theirs := libcni.ConfListFromFile(path)
		if _, ours := read(path); (ours == nil) != (theirs == nil) {
			t.Errorf("beside it %s: libcni says %v, and we say %v", beside, theirs, ours)
		}
	}
}
