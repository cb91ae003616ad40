package roles

import (
	"encoding/json"
	"fmt"
	"regexp"
	"regexp/syntax"
	"slices"
	"strings"
	"sync"
)

// Format is how the patterns of a namespace are written.
type Format string

const (
	// Glob knows one wildcard, "*", which stands for any run of characters.
	Glob Format = "glob"
	// Regexp is RE2, matched against the whole ARN.
	Regexp Format = "regexp"
)

// ParseFormat is the format of that name.
func ParseFormat(name string) (Format, error) {
	switch f := Format(name); f {
	case Glob, Regexp:
		return f, nil
	}
	return "", fmt.Errorf("%q is neither %q nor %q", name, Glob, Regexp)
}

// Restriction is the namespaces' say in which roles their pods may have: the annotation Key holds a JSON array of patterns
// (role names or ARNs), one of which must match. No annotation, an empty one and a malformed one allow nothing.
//
// PermittedKey is kiam's: one regular expression. Where a namespace has both, both must allow the role.
type Restriction struct {
	Key    string
	Format Format
	// PermittedKey is empty where kiam's annotation is not read.
	PermittedKey string

	lists lists
}

// These bound what a namespace can make the proxy compile: how many patterns, of how many bytes, and of how many instructions they are in
// all. A repetition is as many times its operand, so a short pattern may be a program of a hundred megabytes.
const (
	maxPatterns = 128
	maxPattern  = 2048
	maxProgram  = 6_000 // each may be looked at for each character of a role's ARN: some 80 ms for the longest
	// maxKept bounds the instructions of all that is kept compiled.
	maxKept = 100_000
)

// Keys are the annotations of a namespace that are read.
func (r *Restriction) Keys() []string {
	if r.PermittedKey == "" {
		return []string{r.Key}
	}
	return []string{r.Key, r.PermittedKey}
}

func (r *Restriction) allows(annotations map[string]string, arn, baseARN string) error {
	listed, hasList := annotations[r.Key]
	var permitted string
	var hasPermitted bool
	if r.PermittedKey != "" {
		permitted, hasPermitted = annotations[r.PermittedKey]
	}
	if !hasList && !hasPermitted {
		return fmt.Errorf("%w: it has no annotation %s", ErrForbidden, strings.Join(r.Keys(), " or "))
	}
	if hasList {
		if err := r.list(r.Key, listed, r.Format).allows(arn, baseARN); err != nil {
			return err
		}
	}
	if hasPermitted {
		return r.list(r.PermittedKey, permitted, Regexp).allows(arn, baseARN)
	}
	return nil
}

// list is the patterns of an annotation.
type list struct {
	key      string
	patterns []pattern
	err      error // why it allows nothing
	program  int   // how many instructions it has

	mu      sync.Mutex
	matched map[string]bool // by role, as it was matched before
}

// maxMatched bounds that.
const maxMatched = 256

type pattern struct {
	*regexp.Regexp
	whole bool // whether it is of whole ARNs, or of what stands under the base ARN, as a role's name does
}

// lists keeps annotations compiled: each pod of a namespace is decided by the same ones, and again whenever it changes.
type lists struct {
	mu      sync.Mutex
	known   map[[2]string]*list // by key and text
	program int                 // the instructions of all
}

func (r *Restriction) list(key, text string, format Format) *list {
	r.lists.mu.Lock()
	defer r.lists.mu.Unlock()
	id := [2]string{key, text}
	if l := r.lists.known[id]; l != nil {
		return l
	}
	patterns, err := []string{text}, error(nil)
	if key == r.Key {
		patterns = nil
		if err = json.Unmarshal([]byte(text), &patterns); err != nil {
			err = fmt.Errorf("it is not a JSON array of strings: %q", shorten(text))
		}
	}
	l := &list{key: key}
	if err == nil {
		err = l.compile(patterns, format)
	}
	if err != nil {
		l = &list{key: key, err: fmt.Errorf("%w: its annotation %s: %w", ErrForbidden, key, err)}
	}
	size := l.program + 1 + len(text)/8
	if r.lists.program += size; r.lists.known == nil || r.lists.program > maxKept {
		r.lists.known, r.lists.program = make(map[[2]string]*list), size
	}
	r.lists.known[id] = l
	return l
}

// compile compiles all patterns before one is believed: a list with a malformed pattern is not what its author meant.
func (l *list) compile(patterns []string, format Format) error {
	if len(patterns) > maxPatterns {
		return fmt.Errorf("it has %d patterns, more than %d", len(patterns), maxPatterns)
	}
	for _, p := range patterns {
		re, size, err := compile(p, format, maxProgram-l.program)
		if err != nil {
			return fmt.Errorf("the pattern %q: %w", shorten(p), err)
		}
		l.program += size
		l.patterns = append(l.patterns, pattern{re, strings.HasPrefix(strings.TrimPrefix(p, "^"), "arn:")})
	}
	return nil
}

// allows is nil where one of the patterns matches the role.
func (l *list) allows(arn, baseARN string) error {
	if l.err != nil {
		return l.err
	}
	l.mu.Lock()
	allowed, known := l.matched[arn]
	l.mu.Unlock()
	if !known {
		allowed = l.matches(arn, baseARN)
		l.mu.Lock()
		if len(l.matched) >= maxMatched || l.matched == nil {
			l.matched = make(map[string]bool)
		}
		l.matched[arn] = allowed
		l.mu.Unlock()
	}
	if !allowed {
		return fmt.Errorf("%w: no pattern of its annotation %s matches", ErrForbidden, l.key)
	}
	return nil
}

func (l *list) matches(arn, baseARN string) bool {
	name, under := strings.CutPrefix(arn, baseARN)
	return slices.ContainsFunc(l.patterns, func(p pattern) bool {
		return p.whole && p.MatchString(arn) || !p.whole && under && p.MatchString(name)
	})
}

// compile anchors the pattern at both ends, and tells how many instructions it is; no more than most.
func compile(text string, format Format, most int) (re *regexp.Regexp, size int, err error) {
	if text == "" || len(text) > maxPattern {
		return nil, 0, fmt.Errorf("it does not have 1 to %d bytes", maxPattern)
	}
	expr := text
	if format == Glob {
		expr = strings.ReplaceAll(regexp.QuoteMeta(text), `\*`, `.*`)
	}
	// Parsed alone first, so that an unbalanced ")" cannot close the group that anchors it.
	parsed, err := syntax.Parse(expr, syntax.Perl)
	if err != nil {
		return nil, 0, err
	}
	if size = instructions(parsed); size > most {
		return nil, 0, fmt.Errorf("with it the annotation is too large: more than %d instructions", maxProgram)
	}
	re, err = regexp.Compile(`\A(?:` + expr + `)\z`)
	return re, size, err
}

// instructions is about how many a regular expression is compiled to, and at most maxProgram+1.
func instructions(re *syntax.Regexp) int {
	n := 1 + len(re.Rune)/2 // a class is one with a table
	if re.Op == syntax.OpLiteral {
		n = len(re.Rune)
	}
	for _, sub := range re.Sub {
		n = min(n+instructions(sub), maxProgram+1)
	}
	if re.Op == syntax.OpRepeat {
		n *= max(re.Min, re.Max, 1) // Max is -1 for no end
	}
	return min(n, maxProgram+1)
}
