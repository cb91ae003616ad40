package credentials

import (
	"encoding/json"
	"errors"
	"fmt"
)

// Kind is what an error of STS means for the clients that wait.
type Kind int

const (
	// Unavailable is a temporary failure: the network, a server's error, an invalid answer.
	Unavailable Kind = iota
	// Throttled is a refusal because of too many calls.
	Throttled
	// Denied is a refusal that lasts until a policy or an annotation is changed.
	Denied
	// Malformed is a request that STS grants to no principal: an annotation is wrong.
	Malformed
	// NodeCredentials means that the node's own credentials are missing or not accepted.
	NodeCredentials
	// ClockSkew means that STS refuses the node's signatures because the node's clock is wrong.
	ClockSkew
)

// String is the kind's name in logs and metrics.
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

// Error is why STS issued no credentials. It holds no secret.
type Error struct {
	Kind Kind
	// Code is the error code of STS or of the SDK, such as "AccessDenied"; Message is its text. Either may be empty.
	// Message may name the node's own role: it is for the node's log, not for pods.
	Code, Message string
	// Cause explains Code and Message in words that a pod's owner may read; empty if they do not tell.
	Cause string
}

// Error implements error.
func (e *Error) Error() string {
	return fmt.Sprintf("sts: %s: %s: %s", e.Kind, e.Code, e.Message)
}

// asError returns the error as an *Error; nil for nil. Any other type is Unavailable.
func asError(err error) *Error {
	if err == nil {
		return nil
	}
	if e, ok := errors.AsType[*Error](err); ok {
		return e
	}
	return &Error{Kind: Unavailable, Code: "RequestError", Message: err.Error()}
}

// outcome returns the name of the error's kind, or "ok": one of seven values, so that the metric's cardinality is bounded.
func outcome(e *Error) string {
	if e == nil {
		return "ok"
	}
	return e.Kind.String()
}

// quote returns a JSON string.
func quote(s string) []byte {
	// Marshalling a string cannot fail.
	b, _ := json.Marshal(s)
	return b
}
