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
// (role names or ARNs), one of which must match the whole ARN. No annotation, an empty one and a malformed one allow nothing.
type Restriction struct {
	Key    string
	Format Format
}

// maxPatterns and maxPattern bound what a namespace can make the proxy compile.
const (
	maxPatterns = 256
	maxPattern  = 2048
)

func (r *Restriction) allows(annotations map[string]string, arn, baseARN string) error {
	value, ok := annotations[r.Key]
	if !ok {
		return fmt.Errorf("%w: it has no annotation %s", ErrForbidden, r.Key)
	}
	var patterns []string
	if err := json.Unmarshal([]byte(value), &patterns); err != nil {
		return fmt.Errorf("%w: its annotation %s is not a JSON array of strings: %q", ErrForbidden, r.Key, shorten(value))
	}
	if len(patterns) > maxPatterns {
		return fmt.Errorf("%w: its annotation %s has %d patterns, more than %d", ErrForbidden, r.Key, len(patterns), maxPatterns)
	}
	// All are compiled before one is believed: a list with a malformed pattern is not what its author meant.
	allowed := false
	for _, p := range patterns {
		re, err := r.compile(p, baseARN)
		if err != nil {
			return fmt.Errorf("%w: its annotation %s: %w", ErrForbidden, r.Key, err)
		}
		allowed = allowed || re.MatchString(arn)
	}
	if !allowed {
		return fmt.Errorf("%w: no pattern of its annotation %s matches", ErrForbidden, r.Key)
	}
	return nil
}

// compile anchors the pattern at both ends; one that is no ARN stands under the base ARN, as a role's name would.
func (r *Restriction) compile(pattern, baseARN string) (*regexp.Regexp, error) {
	if pattern == "" || len(pattern) > maxPattern {
		return nil, fmt.Errorf("the pattern %q does not have 1 to %d bytes", shorten(pattern), maxPattern)
	}
	prefix := ""
	if !strings.HasPrefix(strings.TrimPrefix(pattern, "^"), "arn:") {
		prefix = regexp.QuoteMeta(baseARN)
	}
	expr := strings.ReplaceAll(regexp.QuoteMeta(pattern), `\*`, `.*`)
	if r.Format == Regexp {
		// Parsed alone first, so that an unbalanced ")" cannot close the group that anchors it.
		if _, err := regexp.Compile(pattern); err != nil {
			return nil, fmt.Errorf("the pattern %q: %w", shorten(pattern), err)
		}
		expr = pattern
	}
	re, err := regexp.Compile(`\A` + prefix + `(?:` + expr + `)\z`)
	if err != nil {
		return nil, fmt.Errorf("the pattern %q: %w", shorten(pattern), err)
	}
	return re, nil
}
