package roles

import (
	"errors"
	"fmt"
	"time"
)

// ErrNoRole means that the pod has no role annotation and there is no default role.
var ErrNoRole = errors.New("the pod has no role annotation and there is no default role")

// ErrForbidden means that the pod's namespace does not allow the role.
var ErrForbidden = errors.New("the namespace does not allow the role")

// InvalidError means that a value is invalid.
type InvalidError struct {
	// Key is the annotation's key, or "default role" if the value is from --default-role.
	Key string
	Err error
}

func (e *InvalidError) Error() string { return e.Key + ": " + e.Err.Error() }
func (e *InvalidError) Unwrap() error { return e.Err }

// Subject is the pod that needs a role.
type Subject struct {
	Namespace, Name, UID, ServiceAccount string
	Annotations                          map[string]string
	// NamespaceAnnotations returns the annotations of the pod's namespace. It is called only if the
	// rules have a Restriction.
	NamespaceAnnotations func() (map[string]string, error)
}

// Rules are the settings that turn annotations into roles. The zero value accepts only full ARNs
// and restricts nothing.
type Rules struct {
	// The keys of the pod annotations.
	RoleKey, ExternalIDKey, SessionNameKey, SessionPolicyKey string
	// BaseARN completes role names, as returned by ParseBaseARN; empty if only ARNs are accepted.
	BaseARN string
	// DefaultRole is the name or the ARN of the role of pods without the annotation; empty for
	// none.
	DefaultRole string
	// Duration is the length of a session.
	Duration time.Duration
	// Scope selects which pods share a session. The zero value means PodScope.
	Scope Scope
	// Node is the part of the session name that names this node under RoleScope.
	Node string
	// SourceIdentity sets each session's source identity to the pod's SessionName, so no two pods
	// share a session. No annotation changes the source identity, because policies and readers of
	// CloudTrail trust it.
	SourceIdentity bool
	// Tags has the values of the session tags that are the same for all pods; nil for no session
	// tags at all.
	Tags *Tags
	// Restriction limits roles by namespace; nil for no limits.
	Restriction *Restriction
}

// Assumption returns the parameters of the pod's AssumeRole call. The error is ErrNoRole, an
// *InvalidError, wraps ErrForbidden, or is that of s.NamespaceAnnotations.
func (r *Rules) Assumption(s Subject) (Assumption, error) {
	key := r.RoleKey
	role, annotated := s.Annotations[key]
	if !annotated {
		if r.DefaultRole == "" {
			return Assumption{}, ErrNoRole
		}
		role, key = r.DefaultRole, "default role"
	}
	// An empty annotation is invalid and does not select the default role, because a template
	// probably lacks its value.
	arn, err := r.completeARN(role)
	if err != nil {
		return Assumption{}, &InvalidError{Key: key, Err: err}
	}
	a, err := r.session(s, arn)
	if err != nil {
		return Assumption{}, err
	}
	// The operator chose the default role for every namespace, so no namespace restricts it.
	if r.Restriction == nil || r.isDefault(arn) {
		return a, nil
	}
	annotations, err := s.NamespaceAnnotations()
	if err != nil {
		return Assumption{}, fmt.Errorf("namespace %s: %w", s.Namespace, err)
	}
	if err := r.Restriction.check(annotations, arn, r.BaseARN); err != nil {
		return Assumption{}, fmt.Errorf("namespace %s: role %s: %w", s.Namespace, arn, err)
	}
	return a, nil
}

// Reads reports whether the pod annotation with this key is read.
func (r *Rules) Reads(key string) bool {
	return key == r.RoleKey || key == r.ExternalIDKey || key == r.SessionNameKey || key == r.SessionPolicyKey
}

// Validate returns an error if the default role is invalid.
func (r *Rules) Validate() error {
	if r.DefaultRole == "" {
		return nil
	}
	_, err := r.completeARN(r.DefaultRole)
	return err
}

func (r *Rules) isDefault(arn string) bool {
	defaultARN, err := r.completeARN(r.DefaultRole)
	return err == nil && arn == defaultARN
}
