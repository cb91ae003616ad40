package roles

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"unicode/utf8"
)

// Scope is who shares a session.
type Scope string

const (
	// PodScope gives each pod a session of its own, by which CloudTrail tells who did what.
	PodScope Scope = "pod"
	// RoleScope has the pods of a node that may have a role share one session of it: fewer calls to STS.
	RoleScope Scope = "role"
)

// ParseScope is the scope of that name.
func ParseScope(name string) (Scope, error) {
	switch s := Scope(name); s {
	case PodScope, RoleScope:
		return s, nil
	}
	return "", fmt.Errorf("%q is neither %q nor %q", name, PodScope, RoleScope)
}

// A role session name, as AssumeRole takes it, in bytes.
const minSessionName, maxSessionName = 2, 64

// nodeSessions stands in the place of the namespace in the names of a node's own sessions. No namespace has an underscore in its name.
const nodeSessions = "_kube2iam"

// NodeSessionName is the session name of a node, for what is no single pod's.
func NodeSessionName(node string) string { return SessionName(nodeSessions, node) }

// cutName is how the names end that SessionName has cut.
var cutName = regexp.MustCompile(`=[0-9a-f]{16}$`)

// SessionName is the session name of a pod, "<namespace>.<pod>". A namespace holds no dot, so the names of two pods never
// meet; one that is too long, or outside the alphabet that AssumeRole takes, is cut and cleaned and ends in a hash of
// the whole.
func SessionName(namespace, pod string) string {
	whole := namespace + "." + pod
	clean := strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', strings.ContainsRune("_+=,.@-", r):
			return r
		}
		return '-'
	}, whole)
	if clean == whole && len(clean) <= maxSessionName {
		return clean
	}
	sum := sha256.Sum256([]byte(whole))
	suffix := "=" + hex.EncodeToString(sum[:8]) // "=" stands in no Kubernetes name, so no whole name ends like this
	return clean[:min(len(clean), maxSessionName-len(suffix))] + suffix
}

// sessionWord is what a role session name and a source identity are made of.
// https://docs.aws.amazon.com/STS/latest/APIReference/API_AssumeRole.html
var sessionWord = regexp.MustCompile(`^[\w+=,.@-]+$`)

// chosenSessionName checks the session name that a pod's annotation asks for. A name with a dot says whose it is, as the names do that
// pods have by default: so it must begin with the pod's own namespace, or one pod could act in another's name.
func chosenSessionName(name, namespace string) error {
	if len(name) < minSessionName || len(name) > maxSessionName || !sessionWord.MatchString(name) {
		return fmt.Errorf("%q is not a session name: %d to %d of letters, digits and _+=,.@-", shorten(name), minSessionName, maxSessionName)
	}
	owner, _, dotted := strings.Cut(name, ".")
	switch {
	case dotted && owner != namespace:
		return fmt.Errorf("%q has a dot, and what is before it is not the pod's namespace", name)
	case !dotted && cutName.MatchString(name):
		// That of a pod in a namespace with a long name has lost its dot.
		return fmt.Errorf("%q ends as names do that were cut", name)
	}
	return nil
}

// maxSessionPolicy is in characters, and counts what is sent.
const maxSessionPolicy = 2048

// sessionPolicy is the policy of an annotation without the white space between its tokens, of which STS counts every character.
func sessionPolicy(text string) (string, error) {
	var outline struct {
		Statement json.RawMessage
	}
	if err := json.Unmarshal([]byte(text), &outline); err != nil {
		return "", fmt.Errorf("it is not the JSON of a policy: %w", err)
	}
	if outline.Statement == nil {
		return "", errors.New("it is not a policy: it has no Statement")
	}
	var compact bytes.Buffer
	if err := json.Compact(&compact, []byte(text)); err != nil {
		return "", err
	}
	policy := compact.String()
	if n := utf8.RuneCountInString(policy); n > maxSessionPolicy {
		return "", fmt.Errorf("it has %d characters without white space, more than %d", n, maxSessionPolicy)
	}
	for _, r := range policy {
		if r < ' ' || r > 0xff {
			return "", fmt.Errorf("it has the character %q, which STS takes in no policy", r)
		}
	}
	return policy, nil
}

// Not "{0,256}": of a class as large as this one, that takes ten megabytes.
var tagValue = regexp.MustCompile(`^[\p{L}\p{Z}\p{N}_.:/=+\-@]*$`)

// maxTagValue is in characters.
const maxTagValue = 256

// TagValue checks the value of a session tag.
func TagValue(value string) error {
	if utf8.RuneCountInString(value) > maxTagValue || !tagValue.MatchString(value) {
		return fmt.Errorf("%q is not the value of a session tag: up to %d of letters, digits, spaces and _.:/=+-@", shorten(value), maxTagValue)
	}
	return nil
}
