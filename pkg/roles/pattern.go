package roles

import (
	"fmt"
	"regexp"
	"regexp/syntax"
	"strings"
)

// These limits bound the CPU time and the memory that a namespace's annotation can use. Even a
// short pattern can be large: (.{1000}){100} has 100,000 instructions. Matching takes time
// proportional to the number of instructions and to the length of the ARN, at most about 80 ms.
const (
	maxPatterns = 128
	maxPattern  = 2048  // bytes
	maxProgram  = 6_000 // instructions of all patterns of an annotation
)

// pattern is an expression that must match the whole ARN of a role, or its whole name.
type pattern struct {
	re    *regexp.Regexp
	isARN bool // starts with "arn:"
}

// compilePatterns returns the patterns of one annotation, or an error if one is invalid.
func compilePatterns(texts []string, format Format) ([]pattern, error) {
	if len(texts) > maxPatterns {
		return nil, fmt.Errorf("it has %d patterns, more than %d", len(texts), maxPatterns)
	}
	patterns := make([]pattern, 0, len(texts))
	budget := maxProgram
	for _, text := range texts {
		re, err := compile(text, format, &budget)
		if err != nil {
			return nil, fmt.Errorf("the pattern %.128q: %w", text, err)
		}
		patterns = append(patterns, pattern{re, strings.HasPrefix(strings.TrimPrefix(text, "^"), "arn:")})
	}
	return patterns, nil
}

// compile anchors the pattern at both ends and subtracts its instructions from the budget.
func compile(text string, format Format, budget *int) (*regexp.Regexp, error) {
	if text == "" || len(text) > maxPattern {
		return nil, fmt.Errorf("it does not have 1 to %d bytes", maxPattern)
	}
	if format == Glob {
		text = strings.ReplaceAll(regexp.QuoteMeta(text), `\*`, `.*`)
	}
	// Parsed before the anchors are added: an unbalanced ")" would close the group that anchors it.
	parsed, err := syntax.Parse(text, syntax.Perl)
	if err != nil {
		return nil, err
	}
	if *budget -= instructions(parsed); *budget < 0 {
		return nil, fmt.Errorf("with it the annotation is too large: more than %d instructions", maxProgram)
	}
	return regexp.Compile(`\A(?:` + text + `)\z`)
}

// instructions estimates the number of instructions of the compiled expression. It returns at most
// maxProgram+1. It does not compile the expression, because that can allocate 128 MB.
func instructions(re *syntax.Regexp) int {
	n := 1 + len(re.Rune)/2 // a character class is one instruction with a table of ranges
	if re.Op == syntax.OpLiteral {
		n = len(re.Rune)
	}
	for _, sub := range re.Sub {
		n = min(n+instructions(sub), maxProgram+1)
	}
	if re.Op == syntax.OpRepeat {
		n *= max(re.Min, re.Max, 1) // Max is -1 if unbounded
	}
	return min(n, maxProgram+1)
}
