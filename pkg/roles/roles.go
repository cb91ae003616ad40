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
	Namespace, Name, UID, ServiceAccount string
	// Annotations are the pod's own.
	Annotations map[string]string
	// NamespaceAnnotations are those of the pod's namespace. They are asked for only where the namespaces restrict roles.
	NamespaceAnnotations func() (map[string]string, error)
}

// Rules is how annotations become roles. Its zero value knows full ARNs only and restricts nothing.
type Rules struct {
	// RoleKey and the others are the pod's annotations to read; an empty one is not read.
	RoleKey, ExternalIDKey, SessionNameKey, SessionPolicyKey string
	// BaseARN completes bare role names; empty where only ARNs are understood. It comes from the function BaseARN.
	BaseARN string
	// DefaultRole is the role, name or ARN, of a pod without the annotation; empty for none.
	DefaultRole string
	// Duration is how long a session lasts.
	Duration time.Duration
	// Scope is who shares a session; the zero value means PodScope.
	Scope Scope
	// Node names this node's sessions of RoleScope.
	Node string
	// SourceIdentity sets each session's source identity to SessionName of the pod, whatever its annotations say: policies and
	// readers of CloudTrail trust it as an administrator's choice. It makes the sessions of RoleScope each pod's own.
	SourceIdentity bool
	// Tags, where not nil, are the session tags that are the same for all; those of the pod are added.
	Tags *Tags
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
	a, err := r.session(s, arn)
	if err != nil {
		return Assumption{}, err
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

// Annotated tells whether a pod's annotations ask for a role.
func (r *Rules) Annotated(annotations map[string]string) bool {
	_, ok := annotations[r.RoleKey]
	return ok
}

// Keeps tells whether an annotation of pods is read.
func (r *Rules) Keeps(key string) bool {
	return key != "" && (key == r.RoleKey || key == r.ExternalIDKey || key == r.SessionNameKey || key == r.SessionPolicyKey)
}

// session is the assumption of the role by what the subject says of its session. The error is an *InvalidError.
func (r *Rules) session(s Subject, arn string) (Assumption, error) {
	a := Assumption{RoleARN: arn, Duration: r.Duration}
	var err error
	annotated := func(key string, take func(value string) error) {
		value, ok := s.Annotations[key]
		if !ok || key == "" || err != nil {
			return
		}
		if problem := take(value); problem != nil {
			err = &InvalidError{Key: key, Err: problem}
		}
	}
	a.SessionName = SessionName(s.Namespace, s.Name)
	if r.Scope == RoleScope {
		a.SessionName = NodeSessionName(r.Node)
	}
	if r.SourceIdentity {
		a.SourceIdentity = SessionName(s.Namespace, s.Name)
	}
	annotated(r.SessionNameKey, func(v string) error {
		a.SessionName = v
		return chosenSessionName(v, s.Namespace)
	})
	annotated(r.ExternalIDKey, func(v string) error {
		a.ExternalID = v
		return validExternalID(v)
	})
	annotated(r.SessionPolicyKey, func(v string) (problem error) {
		a.SessionPolicy, problem = sessionPolicy(v)
		return problem
	})
	if err != nil {
		return Assumption{}, err
	}
	if r.Tags != nil {
		a.Tags = *r.Tags
		a.Tags.Namespace, a.Tags.ServiceAccount = s.Namespace, s.ServiceAccount
		if r.Scope != RoleScope { // which would be no pod's own any more
			a.Tags.PodName, a.Tags.PodUID = s.Name, s.UID
		}
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
			return "", fmt.Errorf("%q is a role's name, and the proxy's --base-role-arn, which would complete it to an ARN, is not set", shorten(role))
		}
		arn = r.BaseARN + strings.TrimPrefix(role, "/")
	}
	if err := ValidARN(arn); err != nil {
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
