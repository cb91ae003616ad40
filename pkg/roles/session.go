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

// Scope selects which pods share a session.
type Scope string

const (
	// PodScope gives each pod its own session, so CloudTrail shows which pod made a call.
	PodScope Scope = "pod"
	// RoleScope lets pods of a node with the same role share one session. That saves calls to STS.
	RoleScope Scope = "role"
)

// session returns the assumption of the role with the session parameters of the pod. An error is an
// *InvalidError.
func (r *Rules) session(s Subject, arn string) (Assumption, error) {
	a := Assumption{RoleARN: arn, Duration: r.Duration, SessionName: SessionName(s.Namespace, s.Name)}
	if r.SourceIdentity {
		a.SourceIdentity = a.SessionName
	}
	if r.Scope == RoleScope {
		a.SessionName = NodeSessionName(r.Node)
	}
	if r.Tags != nil {
		a.Tags = *r.Tags
		a.Tags.Namespace, a.Tags.ServiceAccount = s.Namespace, s.ServiceAccount
		if r.Scope != RoleScope { // these two would make each pod's session different
			a.Tags.PodName, a.Tags.PodUID = s.Name, s.UID
		}
	}
	for _, annotation := range []struct {
		key   string
		field *string
		parse func(string) (string, error)
	}{
		{r.SessionNameKey, &a.SessionName, func(v string) (string, error) { return v, validateSessionName(v, s.Namespace) }},
		{r.ExternalIDKey, &a.ExternalID, func(v string) (string, error) { return v, validateExternalID(v) }},
		{r.SessionPolicyKey, &a.SessionPolicy, parseSessionPolicy},
	} {
		if value, ok := s.Annotations[annotation.key]; ok {
			var err error
			if *annotation.field, err = annotation.parse(value); err != nil {
				return Assumption{}, &InvalidError{Key: annotation.key, Err: err}
			}
		}
	}
	return a, nil
}

const maxSessionName = 64 // bytes

var (
	// sessionName is AssumeRole's syntax of session names and source identities. invalidInName
	// matches a character that the syntax excludes.
	// https://docs.aws.amazon.com/STS/latest/APIReference/API_AssumeRole.html
	sessionName   = regexp.MustCompile(`^[\w+=,.@-]{2,64}$`)
	invalidInName = regexp.MustCompile(`[^\w+=,.@-]`)
	// hashedName matches the end of names that SessionName truncated.
	hashedName = regexp.MustCompile(`=[0-9a-f]{16}$`)
)

// NodeSessionName returns the name of the node's own sessions. A Kubernetes namespace has no
// underscore in its name, so no pod has this session name.
func NodeSessionName(node string) string { return SessionName("_kube2iam", node) }

// SessionName returns the default session name of a pod, "<namespace>.<pod>". A namespace has no
// dot in its name, so two pods never have the same session name. If the name is too long or has
// characters that AssumeRole does not accept, it is truncated, cleaned, and ends in a hash of the
// whole name.
func SessionName(namespace, pod string) string {
	whole := namespace + "." + pod
	clean := invalidInName.ReplaceAllString(whole, "-")
	if clean == whole && len(clean) <= maxSessionName {
		return clean
	}
	sum := sha256.Sum256([]byte(whole))
	suffix := "=" + hex.EncodeToString(sum[:8]) // Kubernetes names have no "=", so no other default name ends like this
	return clean[:min(len(clean), maxSessionName-len(suffix))] + suffix
}

// validateSessionName checks a session name from a pod's annotation. The name must not be the
// default name of a pod in another namespace. So a dotted name must start with the pod's namespace.
// A name without a dot must not end in a hash, because SessionName truncates a default name before
// its dot if the namespace's name is long.
func validateSessionName(name, namespace string) error {
	if !sessionName.MatchString(name) {
		return fmt.Errorf("%.128q is not a session name: 2 to 64 of letters, digits and _+=,.@-", name)
	}
	prefix, _, dotted := strings.Cut(name, ".")
	switch {
	case dotted && prefix != namespace:
		return fmt.Errorf("%q has a dot, and the part before it is not the pod's namespace", name)
	case !dotted && hashedName.MatchString(name):
		return fmt.Errorf("%q ends like a shortened default name", name)
	}
	return nil
}

const maxExternalID = 1224

var externalID = regexp.MustCompile(`^[\w+=,.@:/-]{2,}$`)

// validateExternalID checks an external ID. The error does not contain the ID, which may be a
// secret.
func validateExternalID(id string) error {
	if len(id) > maxExternalID || !externalID.MatchString(id) {
		return fmt.Errorf("it is not an external ID: 2 to %d of letters, digits and _+=,.@:/-", maxExternalID)
	}
	return nil
}

// maxSessionPolicy is AssumeRole's limit, in characters of the compact policy.
const maxSessionPolicy = 2048

// parseSessionPolicy validates a policy and removes insignificant white space, which STS would
// count.
func parseSessionPolicy(text string) (string, error) {
	var outline struct{ Statement json.RawMessage }
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
	if strings.ContainsFunc(policy, func(r rune) bool { return r < ' ' || r > 0xff }) {
		return "", errors.New("it has a character that STS accepts in no policy: only Latin-1 is accepted")
	}
	return policy, nil
}

// tagValue does not limit the length: with {0,256}, so large a character class would compile to ten
// megabytes.
var tagValue = regexp.MustCompile(`^[\p{L}\p{Z}\p{N}_.:/=+\-@]*$`)

// maxTagValue is the limit of a tag's value, in characters.
const maxTagValue = 256

// ValidateTagValue returns an error if STS would refuse the value of a session tag.
func ValidateTagValue(value string) error {
	if utf8.RuneCountInString(value) > maxTagValue || !tagValue.MatchString(value) {
		return fmt.Errorf("%.128q is not the value of a session tag: up to %d of letters, digits, spaces and _.:/=+-@", value, maxTagValue)
	}
	return nil
}
