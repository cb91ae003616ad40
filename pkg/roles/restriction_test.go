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

// TestPatternLimits checks that short annotations which would compile to huge programs are refused
// before they are compiled.
func TestPatternLimits(t *testing.T) {
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
		"nested repetition":    {jsonOf("(.{30}){30}"), true},
		"many repetitions":     {jsonOf(strings.Repeat(".{1000}", 250)), false},
		"alternatives":         {jsonOf(strings.Repeat("(a{500}|b{500})?", 100)), false},
		"many programs":        {jsonOf(many...), false},
		"many large classes":   {jsonOf(strings.Repeat(`[\pL\pN]`, 150)), false},
		"unbounded repetition": {jsonOf("a{900,}"), true},
		"most patterns":        {jsonOf(harmless...), true},
		"too many patterns":    {jsonOf(append(harmless, "x")...), false},
		"too long a pattern":   {jsonOf(strings.Repeat("a", maxPattern+1)), false},
		"longest pattern":      {jsonOf(strings.Repeat("a", maxPattern)), true},
	} {
		t.Run(name, func(t *testing.T) {
			r := &Restriction{Key: "allowed", Format: Regexp}
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			err := r.check(map[string]string{"allowed": tt.text}, base+"admin", base)
			runtime.ReadMemStats(&after)
			if !errors.Is(err, ErrForbidden) || strings.Contains(err.Error(), "no pattern matches") != tt.ok {
				t.Error(err)
			}
			if allocated := after.TotalAlloc - before.TotalAlloc; allocated > 16<<20 {
				t.Errorf("%d MiB were allocated", allocated>>20)
			}
		})
	}
}

func TestProgramSizeLimitHoldsForEachSyntax(t *testing.T) {
	for name, patterns := range map[string][]string{
		"unbounded repetition": {strings.Repeat("a{1000,}", 21)}, "literals": make([]string, 21),
	} {
		for i := range patterns {
			if patterns[i] == "" {
				patterns[i] = strings.Repeat("x", 1000)
			}
		}
		text, err := json.Marshal(patterns)
		if err != nil {
			t.Fatal(err)
		}
		r := &Restriction{Key: "allowed", Format: Regexp}
		if err := r.check(map[string]string{"allowed": string(text)}, "arn:aws:iam::123456789012:role/a", ""); err == nil || !strings.Contains(err.Error(), "too large") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestAnnotationsHaveTheirOwnSyntax checks that one text is a list in one annotation and an
// expression in kiam's.
func TestAnnotationsHaveTheirOwnSyntax(t *testing.T) {
	r := &Restriction{Key: "allowed", Format: Glob}
	annotations := map[string]string{"allowed": `["team-a"]`, PermittedKey: `["team-a"]`}
	if err := r.check(annotations, base+"team-a", base); !errors.Is(err, ErrForbidden) {
		t.Error(err)
	}
}

func TestCompiledPatternsAreCachedAndBounded(t *testing.T) {
	r := &Restriction{Key: "allowed", Format: Regexp}
	check := func(text string) error { return r.check(map[string]string{"allowed": text}, base+"team-a", base) }
	for i := range 3 * maxCompiled {
		if err := check(jsonOf("team-a", fmt.Sprint(i))); err != nil || len(r.compiled) > maxCompiled {
			t.Fatalf("%v, %d annotations are cached", err, len(r.compiled))
		}
	}
	text := jsonOf("team-[a-z]")
	allocated := testing.AllocsPerRun(100, func() {
		if err := check(text); err != nil {
			t.Fatal(err)
		}
	})
	if allocated > 10 {
		t.Errorf("a decision with cached patterns allocates %v times", allocated)
	}
	for range 2 {
		if err := check(jsonOf("team-b")); !errors.Is(err, ErrForbidden) {
			t.Errorf("after the annotation changed: %v", err)
		}
		if err := check(jsonOf("(")); !errors.Is(err, ErrForbidden) || !strings.Contains(err.Error(), "the pattern") {
			t.Errorf("malformed annotation: %v", err)
		}
	}
}

func BenchmarkDecision(b *testing.B) {
	for format, pattern := range map[Format]string{Glob: "team-%d-*", Regexp: "team-%d-[a-z]+"} {
		var patterns []string
		for i := range 10 {
			patterns = append(patterns, fmt.Sprintf(pattern, i))
		}
		r, annotations := &Restriction{Key: "allowed", Format: format}, map[string]string{"allowed": jsonOf(patterns...)}
		b.Run(string(format), func(b *testing.B) {
			for b.Loop() {
				if err := r.check(annotations, base+"team-9-reader", base); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// TestNullAllowsNothing has annotations whose arrays have elements that are no string.
func TestNullAllowsNothing(t *testing.T) {
	for _, format := range []Format{Glob, Regexp} {
		r := &Restriction{Key: "allowed", Format: format}
		for _, text := range []string{`null`, `[null]`, `[null,"x"]`, `["x",null]`} {
			for _, role := range []string{"n", "u", "l", "x", "null", ""} {
				if err := r.check(map[string]string{"allowed": text}, base+role, base); !errors.Is(err, ErrForbidden) {
					t.Errorf("%s, %s, role %q: %v", format, text, role, err)
				}
			}
		}
	}
}
