package roles

import (
	"encoding/json"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"testing"
)

func jsonOf(patterns ...string) string {
	text, _ := json.Marshal(patterns) // of strings it cannot fail
	return string(text)
}

// TestNamespaceCannotMakeTheProxyCompileMuch has annotations that are short, and programs that would be huge.
func TestNamespaceCannotMakeTheProxyCompileMuch(t *testing.T) {
	many := make([]string, maxPatterns)
	for i := range many {
		many[i] = fmt.Sprintf("(team-%d-[a-z]{0,50}|x)", i)
	}
	harmless := make([]string, maxPatterns)
	for i := range harmless {
		harmless[i] = fmt.Sprintf("arn:aws:iam::123456789012:role/team-%d/.*", i)
	}
	for name, tt := range map[string]struct {
		text string
		ok   bool
	}{
		"one repetition":       {jsonOf(".{1000}"), true},
		"its square":           {jsonOf("(.{30}){30}"), true},
		"many of them":         {jsonOf(strings.Repeat(".{1000}", 250)), false},
		"alternatives":         {jsonOf(strings.Repeat("(a{500}|b{500})?", 100)), false},
		"many programs":        {jsonOf(many...), false},
		"a table":              {jsonOf(strings.Repeat(`[\pL\pN]`, 150)), false},
		"no end":               {jsonOf("a{900,}"), true},
		"as many as there may": {jsonOf(harmless...), true},
		"one more":             {jsonOf(append(harmless, "x")...), false},
		"a long one":           {jsonOf(strings.Repeat("a", maxPattern+1)), false},
		"as long as it may":    {jsonOf(strings.Repeat("a", maxPattern)), true},
	} {
		t.Run(name, func(t *testing.T) {
			r := &Restriction{Key: "allowed", Format: Regexp}
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			l := r.list("allowed", tt.text, Regexp)
			runtime.ReadMemStats(&after)
			if (l.err == nil) != tt.ok || l.err != nil && !errors.Is(l.err, ErrForbidden) {
				t.Errorf("%v", l.err)
			}
			if took := after.TotalAlloc - before.TotalAlloc; took > 16<<20 {
				t.Errorf("it took %d MiB", took>>20)
			}
		})
	}
}

// TestAnnotationsAreCompiledOnce is a namespace with many pods, and one whose annotation changes all the time.
func TestAnnotationsAreCompiledOnce(t *testing.T) {
	r := &Restriction{Key: "allowed", Format: Glob, PermittedKey: "permitted"}
	annotations := map[string]string{"allowed": `["team-*"]`, "permitted": "team-.*"}
	if err := r.allows(annotations, base+"team-a", base); err != nil {
		t.Fatal(err)
	}
	if n := testing.AllocsPerRun(100, func() { r.allows(annotations, base+"team-b", base) }); n > 0 {
		t.Errorf("%v allocations for a decision by annotations that are known", n)
	}
	for i := range 10_000 {
		annotations["allowed"] = jsonOf(fmt.Sprint("team-a", i), "(")
		if err := r.allows(annotations, base+"team-a", base); !errors.Is(err, ErrForbidden) {
			t.Fatal(err)
		}
		if r.lists.program > maxKept || len(r.lists.known) > maxKept {
			t.Fatalf("%d annotations of %d instructions are kept", len(r.lists.known), r.lists.program)
		}
	}
	// The same text is another list by another key.
	annotations = map[string]string{"allowed": `["team-a"]`, "permitted": `["team-a"]`}
	if err := r.allows(annotations, base+"team-a", base); !errors.Is(err, ErrForbidden) {
		t.Errorf("%v", err)
	}
}
