package layout

import (
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestStatementsOfTheProtocolAreTested compares the numbers of the statements in docs/protocol.md
// with those in the names of tests and of the rows of table tests.
func TestStatementsOfTheProtocolAreTested(t *testing.T) {
	doc, err := os.ReadFile("../../docs/protocol.md")
	if err != nil {
		t.Fatal(err)
	}
	documented := numbers(regexp.MustCompile(`(?m)^- \*\*(IMDS\d\d)\*\* `), doc)
	if len(documented) == 0 {
		t.Fatal("docs/protocol.md has no numbered statements")
	}
	tests := make(map[string]bool)
	named := regexp.MustCompile(`(?:func Test|")(IMDS\d\d)`)
	err = filepath.WalkDir("../..", func(path string, _ fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		data, err := os.ReadFile(path)
		maps.Copy(tests, numbers(named, data))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(slices.Sorted(maps.Keys(documented)), slices.Sorted(maps.Keys(tests))); d != "" {
		t.Errorf("numbers in docs/protocol.md (-) and in tests (+):\n%s", d)
	}
}

func numbers(pattern *regexp.Regexp, text []byte) map[string]bool {
	found := make(map[string]bool)
	for _, m := range pattern.FindAllSubmatch(text, -1) {
		found[string(m[1])] = true
	}
	return found
}
