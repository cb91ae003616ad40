package attach

import "errors"

// Kind says what an error concerns.
type Kind int

const (
	// KindLink is an interface whose packets cannot be matched.
	KindLink Kind = iota
	// KindAddresses is a result with addresses that the interface does not hold.
	KindAddresses
	// KindProxyIP is a node without an address that pods can dial.
	KindProxyIP
	// KindBridge is a bridged pod whose port iptables does not see.
	KindBridge
	// KindRules is rules that could not be made; the attachment has none.
	KindRules
	// KindState is a record that could not be written or read.
	KindState
)

// Error is an error with its kind. Its text is that of Err.
type Error struct {
	Kind Kind
	Err  error
}

func (e *Error) Error() string { return e.Err.Error() }
func (e *Error) Unwrap() error { return e.Err }

// wrap gives an error a kind unless it has one.
func wrap(kind Kind, err error) error {
	if _, hasKind := errors.AsType[*Error](err); hasKind || err == nil {
		return err
	}
	return &Error{kind, err}
}
