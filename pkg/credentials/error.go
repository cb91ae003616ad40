package credentials

import (
	"encoding/json"
	"errors"
	"fmt"
)

// Kind is what an error of STS means for whoever waits.
type Kind int

const (
	// Unavailable is a failure that may pass by itself: the network, a server's error, an answer that makes no sense.
	Unavailable Kind = iota
	// Throttled is a refusal for asking too often.
	Throttled
	// Denied is a refusal that asking again does not change until somebody changes a policy or an annotation.
	Denied
	// Malformed is a request that STS would never grant, whoever asked: an annotation is wrong.
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

// Error is why STS gave no credentials. It holds no secret.
type Error struct {
	Kind Kind
	// Code is the error code of STS or of the SDK, such as "AccessDenied"; Message is its text. Either may be empty.
	// Message may name the node's own role: it is for the node's log, not for pods.
	Code, Message string
	// Cause is what Code and Message mean, in words that a pod's owner may read; empty where they do not tell.
	Cause string
}

// Error implements error.
func (e *Error) Error() string {
	return fmt.Sprintf("sts: %s: %s: %s", e.Kind, e.Code, e.Message)
}

// asError is the error as an *Error; nil for nil. One of no known kind is Unavailable.
func asError(err error) *Error {
	if err == nil {
		return nil
	}
	if e, ok := errors.AsType[*Error](err); ok {
		return e
	}
	return &Error{Kind: Unavailable, Code: "RequestError", Message: err.Error()}
}

// outcome names how a call ended: one of seven words, whatever STS said.
func outcome(e *Error) string {
	if e == nil {
		return "ok"
	}
	return e.Kind.String()
}

// quote is a JSON string.
func quote(s string) []byte {
	// Marshalling a string cannot fail.
	b, _ := json.Marshal(s)
	return b
}
