package layout

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// statements is how many the protocol has, as far as this project holds to it.
const statements = 28

// TestEachStatementOfTheProtocolHasATest holds that a test, or a row of one, carries the number of each statement that pkg/imds
// implements.
func TestEachStatementOfTheProtocolHasATest(t *testing.T) {
	named := regexp.MustCompile(`(?:func Test|")IMDS(\d\d)`)
	found := make(map[string]bool)
	err := filepath.WalkDir("../..", func(path string, _ fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		data, err := os.ReadFile(path)
		for _, m := range named.FindAllStringSubmatch(string(data), -1) {
			found[m[1]] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for i := range statements {
		if number := fmt.Sprintf("%02d", i+1); !found[number] {
			t.Errorf("no test is named for statement %s", number)
		}
	}
}
