package credentials

import (
	"errors"
	"fmt"
)

// Kind classifies the errors of STS.
type Kind int

const (
	// Unavailable is a temporary failure: of the network, of STS, or an invalid answer.
	Unavailable Kind = iota
	// Throttled means too many calls.
	Throttled
	// Denied lasts until a policy or an annotation changes.
	Denied
	// Malformed is a request that STS grants to no principal, because an annotation is wrong.
	Malformed
	// NodeCredentials means that the node has no credentials or that STS does not accept them.
	NodeCredentials
	// ClockSkew means that the node's clock is wrong, so STS refuses its signatures.
	ClockSkew
)

// String returns the kind's name in logs and metrics.
func (k Kind) String() string {
	switch k {
	case Throttled:
		return "throttled"
	case Denied:
		return "denied"
	case Malformed:
		return "malformed"
	case NodeCredentials:
		return "node credentials"
	case ClockSkew:
		return "clock skew"
	}
	return "unavailable"
}

// Error is why STS issued no credentials. It contains no secret.
type Error struct {
	Kind Kind
	// Code is the error code of STS or of the SDK, such as "AccessDenied", and Message its text. Either
	// may be empty. Message may name the node's role, so it is for the log and not for pods.
	Code, Message string
	// Cause explains the error to the pod's owner; empty if the cause is unknown.
	Cause string
}

// Error implements error.
func (e *Error) Error() string {
	return fmt.Sprintf("sts: %s: %s: %s", e.Kind, e.Code, e.Message)
}

// asError returns err as an *Error. It returns nil for nil, and Unavailable for any other type.
func asError(err error) *Error {
	if err == nil {
		return nil
	}
	if e, ok := errors.AsType[*Error](err); ok {
		return e
	}
	return &Error{Kind: Unavailable, Code: "RequestError", Message: err.Error()}
}

// outcome returns "ok" or the name of the error's kind, as a value of a metric's label.
func outcome(e *Error) string {
	if e == nil {
		return "ok"
	}
	return e.Kind.String()
}
