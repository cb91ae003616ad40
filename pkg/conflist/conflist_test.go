package conflist

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const plugin = "kube2iam-cni"

func chain(name string, types ...string) string {
	var plugins []string
	for _, t := range types {
		plugins = append(plugins, `{"type":"`+t+`"}`)
	}
	return `{"cniVersion":"1.0.0","name":"` + name + `","plugins":[` + strings.Join(plugins, ",") + `]}`
}

func TestChained(t *testing.T) {
	for name, tc := range map[string]struct {
		files map[string]string
		want  []string
		err   string // a part of it
	}{
		"no files":                       {},
		"chained":                        {files: map[string]string{"10-a.conflist": chain("a", "bridge", plugin)}, want: []string{"a"}},
		"chained before others":          {files: map[string]string{"10-a.conflist": chain("a", "bridge", plugin, "portmap")}, want: []string{"a"}},
		"not chained":                    {files: map[string]string{"10-a.conflist": chain("a", "bridge", "portmap")}},
		"chained in one of two networks": {files: map[string]string{"10-a.conflist": chain("a", "bridge", plugin), "20-b.conflist": chain("b", "macvlan")}, want: []string{"a"}},
		"chained in two networks":        {files: map[string]string{"10-a.conflist": chain("a", "bridge", plugin), "20-b.conflist": chain("b", "ptp", plugin)}, want: []string{"a", "b"}},
		"one network in two files":       {files: map[string]string{"10-a.conflist": chain("a", "bridge", plugin), "20-a.conflist": chain("a", "ptp", plugin)}, want: []string{"a"}},
		"a single plugin":                {files: map[string]string{"10-a.conf": `{"cniVersion":"0.4.0","name":"a","type":"bridge"}`}},
		"a longer type":                  {files: map[string]string{"10-a.conflist": chain("a", "bridge", plugin+"2")}},
		"another extension":              {files: map[string]string{"10-a.conflist.bak": chain("a", "bridge", plugin)}},
		"an invalid file":                {files: map[string]string{"10-x.conflist": "{", "20-a.conflist": chain("a", "bridge", plugin)}, want: []string{"a"}, err: "10-x.conflist"},
		"in a file of the network's directory": {files: map[string]string{
			"10-a.conflist": `{"cniVersion":"1.1.0","name":"a","loadOnlyInlinedPlugins":false,"plugins":[{"type":"bridge"}]}`,
			"a/50.conf":     `{"cniVersion":"1.1.0","type":"` + plugin + `"}`}, want: []string{"a"}},
		"in a file that loadOnlyInlinedPlugins excludes": {files: map[string]string{
			"10-a.conflist": `{"cniVersion":"1.1.0","name":"a","loadOnlyInlinedPlugins":true,"plugins":[{"type":"bridge"}]}`,
			"a/50.conf":     `{"cniVersion":"1.1.0","type":"` + plugin + `"}`}},
		"too large": {files: map[string]string{"10-a.conflist": chain("a", "bridge", plugin) + strings.Repeat(" ", maxFile)}, err: "more than"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			for file, content := range tc.files {
				path := filepath.Join(dir, file)
				if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			got, err := Chained(dir, plugin)
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Error(diff)
			}
			if (err == nil) != (tc.err == "") || err != nil && !strings.Contains(err.Error(), tc.err) {
				t.Errorf("got the error %v, want %q", err, tc.err)
			}
		})
	}
	if got, err := Chained(filepath.Join(t.TempDir(), "none"), plugin); got != nil || err != nil {
		t.Errorf("without a directory: %v, %v", got, err)
	}
}
