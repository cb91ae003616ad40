package roles

import (
	"errors"
	"fmt"
	"strings"
	"time"
)

// ErrNoRole is the reason of a pod that has no annotation where no default role is set.
var ErrNoRole = errors.New("the pod has no role annotation and there is no default role")

// ErrForbidden is wrapped by the reason of a role that the pod's namespace does not allow.
var ErrForbidden = errors.New("the namespace does not allow the role")

// InvalidError is the reason of an annotation that says nothing usable.
type InvalidError struct {
	// Key is the annotation's key, or the name of the flag that the value came from.
	Key string
	Err error
}

func (e *InvalidError) Error() string { return e.Key + ": " + e.Err.Error() }
func (e *InvalidError) Unwrap() error { return e.Err }

// Subject is who asks for a role.
type Subject struct {
	Namespace, Name string
	// Annotations are the pod's own.
	Annotations map[string]string
	// NamespaceAnnotations are those of the pod's namespace. They are asked for only where the namespaces restrict roles.
	NamespaceAnnotations func() (map[string]string, error)
}

// Rules is how annotations become roles. Its zero value knows full ARNs only and restricts nothing.
type Rules struct {
	// RoleKey and ExternalIDKey are the annotations to read.
	RoleKey, ExternalIDKey string
	// BaseARN completes bare role names; empty where only ARNs are understood. It comes from the function BaseARN.
	BaseARN string
	// DefaultRole is the role, name or ARN, of a pod without the annotation; empty for none.
	DefaultRole string
	// Duration is how long a session lasts.
	Duration time.Duration
	// Restriction is how the namespaces restrict roles; nil where they do not.
	Restriction *Restriction
}

// Assumption is what the subject may assume. The error is ErrNoRole, an *InvalidError, or wraps ErrForbidden; any other
// means that the answer is not known now.
func (r *Rules) Assumption(s Subject) (Assumption, error) {
	key := r.RoleKey
	role, annotated := s.Annotations[key]
	if !annotated {
		role, key = r.DefaultRole, "default role"
	}
	if role == "" {
		// An annotation that is there but empty is no wish for the default: its owner's template failed to fill it.
		if annotated {
			return Assumption{}, &InvalidError{Key: key, Err: errors.New("the value is empty")}
		}
		return Assumption{}, ErrNoRole
	}
	arn, err := r.complete(role)
	if err != nil {
		return Assumption{}, &InvalidError{Key: key, Err: err}
	}
	a := Assumption{RoleARN: arn, SessionName: SessionName(s.Namespace, s.Name), Duration: r.Duration}
	if id, ok := s.Annotations[r.ExternalIDKey]; ok {
		if err := validExternalID(id); err != nil {
			return Assumption{}, &InvalidError{Key: r.ExternalIDKey, Err: err}
		}
		a.ExternalID = id
	}
	// The default role is the operator's own choice, for every namespace.
	if r.Restriction == nil || arn == r.defaultARN() {
		return a, nil
	}
	annotations, err := s.NamespaceAnnotations()
	if err != nil {
		return Assumption{}, fmt.Errorf("namespace %s: %w", s.Namespace, err)
	}
	if err := r.Restriction.allows(annotations, arn, r.BaseARN); err != nil {
		return Assumption{}, fmt.Errorf("namespace %s: role %s: %w", s.Namespace, arn, err)
	}
	return a, nil
}

func (r *Rules) defaultARN() string {
	if r.DefaultRole == "" {
		return ""
	}
	arn, err := r.complete(r.DefaultRole)
	if err != nil {
		return ""
	}
	return arn
}

// complete is the ARN of a role that is named by its ARN or, under the base, by path and name.
func (r *Rules) complete(role string) (string, error) {
	arn := role
	if !strings.HasPrefix(role, "arn:") {
		if r.BaseARN == "" {
			return "", fmt.Errorf("%q is a role's name, and there is no base role ARN to complete it", shorten(role))
		}
		arn = r.BaseARN + strings.TrimPrefix(role, "/")
	}
	if err := validARN(arn); err != nil {
		return "", err
	}
	return arn, nil
}

// Check tells whether the default role is usable, so that a bad one is found at start and not by every pod.
func (r *Rules) Check() error {
	if r.DefaultRole == "" {
		return nil
	}
	_, err := r.complete(r.DefaultRole)
	return err
}
