package roles

import (
	"encoding/json"
	"fmt"
	"regexp"
	"strings"
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
}

// maxPatterns and maxPattern bound what a namespace can make the proxy compile.
const (
	maxPatterns = 256
	maxPattern  = 2048
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
		var patterns []string
		if err := json.Unmarshal([]byte(listed), &patterns); err != nil {
			return fmt.Errorf("%w: its annotation %s is not a JSON array of strings: %q", ErrForbidden, r.Key, shorten(listed))
		}
		if err := match(r.Key, patterns, r.Format, arn, baseARN); err != nil {
			return err
		}
	}
	if hasPermitted {
		return match(r.PermittedKey, []string{permitted}, Regexp, arn, baseARN)
	}
	return nil
}

// match is nil where one of the annotation's patterns matches the role.
func match(key string, patterns []string, format Format, arn, baseARN string) error {
	if len(patterns) > maxPatterns {
		return fmt.Errorf("%w: its annotation %s has %d patterns, more than %d", ErrForbidden, key, len(patterns), maxPatterns)
	}
	// All are compiled before one is believed: a list with a malformed pattern is not what its author meant.
	allowed := false
	for _, p := range patterns {
		re, err := compile(p, format)
		if err != nil {
			return fmt.Errorf("%w: its annotation %s: %w", ErrForbidden, key, err)
		}
		role, ok := arn, true
		if !strings.HasPrefix(strings.TrimPrefix(p, "^"), "arn:") {
			// It stands under the base ARN, as a role's name would.
			role, ok = strings.CutPrefix(arn, baseARN)
		}
		allowed = allowed || ok && re.MatchString(role)
	}
	if !allowed {
		return fmt.Errorf("%w: no pattern of its annotation %s matches", ErrForbidden, key)
	}
	return nil
}

// compile anchors the pattern at both ends.
func compile(pattern string, format Format) (*regexp.Regexp, error) {
	if pattern == "" || len(pattern) > maxPattern {
		return nil, fmt.Errorf("the pattern %q does not have 1 to %d bytes", shorten(pattern), maxPattern)
	}
	expr := strings.ReplaceAll(regexp.QuoteMeta(pattern), `\*`, `.*`)
	if format == Regexp {
		// Parsed alone first, so that an unbalanced ")" cannot close the group that anchors it.
		if _, err := regexp.Compile(pattern); err != nil {
			return nil, fmt.Errorf("the pattern %q: %w", shorten(pattern), err)
		}
		expr = pattern
	}
	re, err := regexp.Compile(`\A(?:` + expr + `)\z`)
	if err != nil {
		return nil, fmt.Errorf("the pattern %q: %w", shorten(pattern), err)
	}
	return re, nil
}
