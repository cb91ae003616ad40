package roles

import (
	"encoding/json"
	"errors"
	"fmt"
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

// Restriction limits the roles of a namespace's pods by the namespace's annotations. A missing, empty
// or malformed annotation allows no role. If a namespace has both annotations, both must allow the role.
type Restriction struct {
	// Key is the annotation that holds a JSON array of patterns: role names or ARNs. One must match.
	Key    string
	Format Format

	mu       sync.Mutex
	compiled map[annotation]compiled // at most maxCompiled
}

// annotation is an annotation's key and value.
type annotation struct{ key, text string }

// compiled is the patterns of an annotation, or why it is malformed.
type compiled struct {
	patterns []pattern
	err      error
}

// maxCompiled bounds the annotations that are kept compiled. The pods of a node rarely belong to more
// namespaces.
const maxCompiled = 32

// Keys returns the keys of the annotations that are read.
func (r *Restriction) Keys() []string { return []string{r.Key, PermittedKey} }

// check returns nil if the namespace's annotations allow the role, else an error that wraps ErrForbidden.
func (r *Restriction) check(annotations map[string]string, arn, baseARN string) error {
	found := false
	for _, key := range r.Keys() {
		text, ok := annotations[key]
		if !ok {
			continue
		}
		found = true
		if err := r.compile(annotation{key, text}).match(arn, baseARN); err != nil {
			return fmt.Errorf("%w: its annotation %s: %w", ErrForbidden, key, err)
		}
	}
	if !found {
		return fmt.Errorf("%w: it has no annotation %s", ErrForbidden, strings.Join(r.Keys(), " or "))
	}
	return nil
}

// compile returns the patterns of an annotation. It caches them: compiling ten patterns takes about 200 µs.
func (r *Restriction) compile(a annotation) compiled {
	r.mu.Lock()
	defer r.mu.Unlock()
	c, ok := r.compiled[a]
	if !ok {
		if r.compiled == nil || len(r.compiled) >= maxCompiled {
			r.compiled = make(map[annotation]compiled)
		}
		c.patterns, c.err = r.parse(a)
		r.compiled[a] = c
	}
	return c
}

func (r *Restriction) parse(a annotation) ([]pattern, error) {
	if a.key == PermittedKey {
		return compilePatterns([]string{a.text}, Regexp)
	}
	var texts []string
	if err := json.Unmarshal([]byte(a.text), &texts); err != nil {
		return nil, fmt.Errorf("it is not a JSON array of strings: %.128q", a.text)
	}
	return compilePatterns(texts, r.Format)
}

// match returns nil if a pattern matches the role. A pattern of ARNs is matched against the ARN, any
// other against the part of the ARN after baseARN.
func (c compiled) match(arn, baseARN string) error {
	name, hasBase := strings.CutPrefix(arn, baseARN)
	for _, p := range c.patterns {
		if p.isARN && p.re.MatchString(arn) || !p.isARN && hasBase && p.re.MatchString(name) {
			return nil
		}
	}
	if c.err != nil {
		return c.err
	}
	return errors.New("no pattern matches")
}
