package rules

import (
	"os"
	"strings"
	"testing"
)

// TestArchitectureShowsRuleset compares the ruleset in docs/architecture.md with its golden file.
func TestArchitectureShowsRuleset(t *testing.T) {
	golden, err := os.ReadFile("testdata/routed.nft")
	if err != nil {
		t.Fatal(err)
	}
	document, err := os.ReadFile("../../docs/architecture.md")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(document), "```text\n"+string(golden)+"```\n") {
		t.Error("docs/architecture.md does not show testdata/routed.nft as it is")
	}
}
