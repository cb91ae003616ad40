package credentials

import "fmt"

// Kind classifies the errors of STS. Its values are used in logs and metrics.
type Kind string

const (
	// Unavailable is a temporary failure: the network or STS fails, or STS's answer is invalid.
	Unavailable Kind = "unavailable"
	// Throttled means that STS refused a call because of too many calls.
	Throttled Kind = "throttled"
	// Denied means that STS refuses this node the role, until a policy or an annotation changes.
	Denied Kind = "denied"
	// Malformed is a request that STS would refuse to any principal, because an annotation is wrong.
	Malformed Kind = "malformed"
	// NodeCredentials means that the node has no credentials or that STS does not accept them.
	NodeCredentials Kind = "node credentials"
	// ClockSkew means that the node's clock is wrong, so STS refuses its signatures.
	ClockSkew Kind = "clock skew"
)

// Error says why STS issued no credentials. It contains no secret.
type Error struct {
	Kind Kind
	// Code is the error code of STS or of the SDK, such as "AccessDenied", and Message its text.
	// Either may be empty. Message may name the node's role, so pods must not receive it.
	Code, Message string
	// Cause explains the error to the pod's owner; empty if the cause is unknown.
	Cause string
}

// Error implements error.
func (e *Error) Error() string {
	return fmt.Sprintf("sts: %s: %s: %s", e.Kind, e.Code, e.Message)
}
