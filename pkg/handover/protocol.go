// Package handover replaces a process that serves TCP sockets by another one without refusing a
// connection. The sockets and a state change hands over a unix socket.
//
// A successor asks for the sockets and the state, accepts on the sockets, and commits. Only then
// does the predecessor stop accepting. Either process accepts a connection that is dialled in
// between. The predecessor keeps its sockets open until it ends, and accepts again if its successor
// ends first.
package handover

import "time"

// The requests of a successor, one byte each. The reply begins with the same byte. A message that
// changes gets another byte: the predecessor closes the connection after a request that it does not
// know.
const (
	requestOffer  = 'o' // the reply has the sockets in its control message, and an offer in JSON
	requestCommit = 'c' // the reply has nothing more; the predecessor has stopped accepting
)

// offer is what a predecessor hands over.
type offer struct {
	// Sockets are the names of the sockets, in the order of their descriptors.
	Sockets      []string
	StateVersion int
	State        []byte
}

// stateVersion is the version of the state. It changes with the meaning of one of its fields. A
// successor that does not know the version starts without the state, and takes the sockets over.
const stateVersion = 1

const (
	// timeout bounds each request and its reply.
	timeout = 10 * time.Second
	// maxOffer bounds an offer, in bytes.
	maxOffer = 64 << 20
	// maxSockets bounds the number of sockets in an offer.
	maxSockets = 8
)
