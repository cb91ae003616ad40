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

// TestPatternLimits uses short annotations that would compile to huge programs.
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
			if took := after.TotalAlloc - before.TotalAlloc; took > 16<<20 {
				t.Errorf("%d MiB were allocated", took>>20)
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

// TestAnnotationsHaveTheirOwnSyntax uses the same text as a list and as kiam's expression.
func TestAnnotationsHaveTheirOwnSyntax(t *testing.T) {
	r := &Restriction{Key: "allowed", Format: Glob, PermittedKey: "permitted"}
	annotations := map[string]string{"allowed": `["team-a"]`, "permitted": `["team-a"]`}
	if err := r.check(annotations, base+"team-a", base); !errors.Is(err, ErrForbidden) {
		t.Error(err)
	}
}
