// Package roles turns the annotations of a pod and its namespace into the role that the pod may have, or into the reason
// why it has none.
package roles

import "time"

// Assumption is everything that goes into one AssumeRole call. It is comparable, and it is the key that credentials are
// kept under: two pods share credentials only where STS could not tell their calls apart.
type Assumption struct {
	// RoleARN is the full ARN of the role.
	RoleARN string
	// SessionName is the role session name, 2 to 64 bytes.
	SessionName string
	// ExternalID is what the role's trust policy may ask for; empty for none.
	ExternalID string
	// Duration is how long the session lasts.
	Duration time.Duration
}

// RoleName is the bare name of the role, without its path: what the metadata service calls it.
func (a Assumption) RoleName() string { return roleName(a.RoleARN) }
