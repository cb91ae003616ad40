package roles

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
)

// Format is the syntax of a namespace's patterns.
type Format string

const (
	// Glob has one wildcard: "*" matches any run of characters.
	Glob Format = "glob"
	// Regexp is RE2 syntax. A pattern must match all of the ARN or name.
	Regexp Format = "regexp"
)

// PermittedKey is kiam's namespace annotation: one regular expression.
const PermittedKey = "iam.amazonaws.com/permitted"

// Restriction limits the roles of a namespace's pods by the namespace's annotations Key and
// PermittedKey. If a namespace has both annotations, both must allow the role. An empty or
// malformed annotation allows no role, and a namespace with neither annotation allows none.
type Restriction struct {
	// Key is the key of the annotation with a JSON array of patterns of role names or ARNs. One
	// pattern must match.
	Key    string
	Format Format

	mu       sync.Mutex
	compiled map[annotation][]pattern // at most maxCompiled
}

// annotation is an annotation's key and value.
type annotation struct{ key, text string }

// maxCompiled bounds the number of annotations whose compiled patterns are cached. The pods of a
// node rarely belong to more namespaces.
const maxCompiled = 32

// Keys returns the keys of the annotations that are read.
func (r *Restriction) Keys() []string { return []string{r.Key, PermittedKey} }

// check returns nil if the namespace's annotations allow the role, else an error that wraps
// ErrForbidden. It matches a pattern of ARNs against the ARN, and any other pattern against the
// part of the ARN after baseARN. If the ARN does not begin with baseARN, such a pattern does not
// match.
func (r *Restriction) check(annotations map[string]string, arn, baseARN string) error {
	name, hasBase := strings.CutPrefix(arn, baseARN)
	matches := func(p pattern) bool {
		return p.isARN && p.re.MatchString(arn) || !p.isARN && hasBase && p.re.MatchString(name)
	}
	found := false
	for _, key := range r.Keys() {
		text, ok := annotations[key]
		if !ok {
			continue
		}
		found = true
		patterns, err := r.compile(annotation{key, text})
		if err == nil && !slices.ContainsFunc(patterns, matches) {
			err = errors.New("no pattern matches")
		}
		if err != nil {
			return fmt.Errorf("%w: its annotation %s: %w", ErrForbidden, key, err)
		}
	}
	if !found {
		return fmt.Errorf("%w: it has no annotation %s", ErrForbidden, strings.Join(r.Keys(), " or "))
	}
	return nil
}

// compile returns the patterns of an annotation. It caches them, because compiling ten patterns
// takes about 200 µs.
func (r *Restriction) compile(a annotation) ([]pattern, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if patterns, ok := r.compiled[a]; ok {
		return patterns, nil
	}
	texts, format := []string{a.text}, Regexp
	if a.key != PermittedKey {
		format = r.Format
		var err error
		if texts, err = decodeStrings(a.text); err != nil {
			return nil, err
		}
	}
	patterns, err := compilePatterns(texts, format)
	if err != nil {
		return nil, err
	}
	if r.compiled == nil || len(r.compiled) >= maxCompiled {
		r.compiled = make(map[annotation][]pattern)
	}
	r.compiled[a] = patterns
	return patterns, nil
}

// decodeStrings decodes a JSON array of strings. It refuses a null, which json.Unmarshal would decode
// to an empty string.
func decodeStrings(text string) ([]string, error) {
	var decoded []*string
	if err := json.Unmarshal([]byte(text), &decoded); err != nil || decoded == nil || slices.Contains(decoded, nil) {
		return nil, fmt.Errorf("it is not a JSON array of strings: %.128q", text)
	}
	texts := make([]string, len(decoded))
	for i, s := range decoded {
		texts[i] = *s
	}
	return texts, nil
}
