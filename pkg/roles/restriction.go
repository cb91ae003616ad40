package roles

import (
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"regexp/syntax"
	"strings"
)

// Format is the syntax of a namespace's patterns.
type Format string

const (
	// Glob has one wildcard: "*" matches any run of characters.
	Glob Format = "glob"
	// Regexp is RE2 syntax. A pattern must match all of the ARN or name.
	Regexp Format = "regexp"
)

// ParseFormat returns the format of that name.
func ParseFormat(name string) (Format, error) {
	switch f := Format(name); f {
	case Glob, Regexp:
		return f, nil
	}
	return "", fmt.Errorf("%q is neither %q nor %q", name, Glob, Regexp)
}

// Restriction names the namespace annotations that limit the roles of a namespace's pods. A missing,
// empty or malformed annotation allows no role. If a namespace has both annotations, both must allow
// the role.
type Restriction struct {
	// Key is the annotation that holds a JSON array of patterns: role names or ARNs. One must match.
	Key    string
	Format Format
	// PermittedKey is kiam's annotation: one regular expression. If empty, no such annotation is read.
	PermittedKey string
}

// These limits bound the CPU and the memory that a namespace's annotation can take. maxProgram is in
// instructions of all compiled patterns: the short pattern (.{1000}){100} is 100,000 of them. Matching
// takes time proportional to the instructions and to the length of the ARN, at most about 80 ms.
const (
	maxPatterns = 128
	maxPattern  = 2048 // bytes
	maxProgram  = 6_000
)

// Keys returns the keys of the annotations that are read.
func (r *Restriction) Keys() []string {
	if r.PermittedKey == "" {
		return []string{r.Key}
	}
	return []string{r.Key, r.PermittedKey}
}

// check returns nil if the namespace's annotations allow the role, else an error that wraps ErrForbidden.
func (r *Restriction) check(annotations map[string]string, arn, baseARN string) error {
	found := false
	for _, key := range r.Keys() {
		text, ok := annotations[key]
		if !ok {
			continue
		}
		found = true
		patterns, format := []string{text}, Regexp
		if key == r.Key {
			patterns, format = nil, r.Format
			if err := json.Unmarshal([]byte(text), &patterns); err != nil {
				return fmt.Errorf("%w: its annotation %s is not a JSON array of strings: %q", ErrForbidden, key, shorten(text))
			}
		}
		if err := match(patterns, format, arn, baseARN); err != nil {
			return fmt.Errorf("%w: its annotation %s: %w", ErrForbidden, key, err)
		}
	}
	if !found {
		return fmt.Errorf("%w: it has no annotation %s", ErrForbidden, strings.Join(r.Keys(), " or "))
	}
	return nil
}

// match returns nil if all patterns are valid and one matches the role. A pattern that starts with
// "arn:" is matched against the ARN, any other against the part of the ARN after baseARN.
func match(patterns []string, format Format, arn, baseARN string) error {
	if len(patterns) > maxPatterns {
		return fmt.Errorf("it has %d patterns, more than %d", len(patterns), maxPatterns)
	}
	compiled := make([]*regexp.Regexp, len(patterns))
	budget := maxProgram
	for i, p := range patterns {
		var err error
		if compiled[i], err = compile(p, format, &budget); err != nil {
			return fmt.Errorf("the pattern %q: %w", shorten(p), err)
		}
	}
	name, hasBase := strings.CutPrefix(arn, baseARN)
	for i, re := range compiled {
		if isARN := strings.HasPrefix(strings.TrimPrefix(patterns[i], "^"), "arn:"); isARN && re.MatchString(arn) ||
			!isARN && hasBase && re.MatchString(name) {
			return nil
		}
	}
	return errors.New("no pattern matches")
}

// compile anchors the pattern at both ends and subtracts its instructions from the budget.
func compile(pattern string, format Format, budget *int) (*regexp.Regexp, error) {
	if pattern == "" || len(pattern) > maxPattern {
		return nil, fmt.Errorf("it does not have 1 to %d bytes", maxPattern)
	}
	expr := pattern
	if format == Glob {
		expr = strings.ReplaceAll(regexp.QuoteMeta(pattern), `\*`, `.*`)
	}
	// Parsed before the anchors are added: an unbalanced ")" would close the group that anchors it.
	parsed, err := syntax.Parse(expr, syntax.Perl)
	if err != nil {
		return nil, err
	}
	if *budget -= instructions(parsed); *budget < 0 {
		return nil, fmt.Errorf("with it the annotation is too large: more than %d instructions", maxProgram)
	}
	return regexp.Compile(`\A(?:` + expr + `)\z`)
}

// instructions estimates the size of the compiled expression, up to maxProgram+1. It does not compile
// the expression, because that allocates up to 128 MB.
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
