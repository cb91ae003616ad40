package layout

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestDocumentsNameWhatExists expects that every test and every path that the documents name
// exists.
func TestDocumentsNameWhatExists(t *testing.T) {
	var documents []string
	for _, pattern := range []string{"../../*.md", "../../docs/*.md", "../../docs/decisions/*.md"} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		documents = append(documents, files...)
	}
	if len(documents) < 10 {
		t.Fatalf("documents: %q", documents)
	}
	tests := definedTests(t)
	path := regexp.MustCompile("`((?:pkg|plugin|proxy|test|conf|scripts)/[A-Za-z0-9_./-]*)`")
	test := regexp.MustCompile("`((?:Test|Fuzz)[A-Za-z0-9]+)`")
	for _, document := range documents {
		text, err := os.ReadFile(document)
		if err != nil {
			t.Fatal(err)
		}
		for _, found := range path.FindAllStringSubmatch(string(text), -1) {
			if _, err := os.Stat(filepath.Join("../..", found[1])); err != nil {
				t.Errorf("%s names %s: %v", document, found[1], err)
			}
		}
		for _, found := range test.FindAllStringSubmatch(string(text), -1) {
			if !slices.Contains(tests, found[1]) {
				t.Errorf("%s names %s, which no package has", document, found[1])
			}
		}
	}
}

// TestMapOfPackagesIsComplete expects every package below pkg in the map of docs/architecture.md.
func TestMapOfPackagesIsComplete(t *testing.T) {
	text, err := os.ReadFile("../../docs/architecture.md")
	if err != nil {
		t.Fatal(err)
	}
	_, packages, ok := strings.Cut(string(text), "\n## Map of packages\n")
	if !ok {
		t.Fatal("docs/architecture.md has no map of packages")
	}
	directories, err := os.ReadDir("../../pkg")
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range directories {
		if !strings.Contains(packages, "`pkg/"+d.Name()+"`") {
			t.Errorf("the map of packages lacks pkg/%s", d.Name())
		}
	}
}

// definedTests returns the names of all tests and fuzz targets.
func definedTests(t *testing.T) []string {
	t.Helper()
	function := regexp.MustCompile(`(?m)^func ((?:Test|Fuzz)[A-Za-z0-9]+)\(`)
	var names []string
	err := filepath.WalkDir("../..", func(path string, _ os.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		text, err := os.ReadFile(path)
		for _, found := range function.FindAllStringSubmatch(string(text), -1) {
			names = append(names, found[1])
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}
