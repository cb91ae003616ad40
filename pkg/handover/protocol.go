// Package handover replaces a process that serves TCP sockets by another one without refusing a
// connection. The old process, the predecessor, sends its sockets and its state to the new one, its
// successor, through a unix socket.
//
// The successor requests the sockets and the state, accepts on the sockets, and commits. Only then
// does the predecessor stop accepting. In between, both processes accept connections. The
// predecessor keeps its sockets open until it ends, and accepts again if its successor ends first.
//
// client.go is the successor's side of the connection, server.go is the predecessor's.
package handover

import "time"

// The requests of a successor, one byte each. The reply begins with the same byte. If a message
// changes in a later version, it must get another byte: the predecessor closes the connection after
// an unknown request. Earlier versions used 'a', 'c' and 's'.
const (
	requestOffer  = 'o' // the reply has the sockets in its control message, and an offer in JSON
	requestCommit = 'd' // the reply is the byte alone; the predecessor has stopped accepting
)

// offer is the predecessor's reply to requestOffer.
type offer struct {
	// Sockets are the names of the sockets, in the order of their descriptors.
	Sockets      []string
	StateVersion int
	State        []byte
}

// stateVersion is the version of the state. It changes when a field of the state changes its
// meaning. A successor with another version takes over the sockets and starts without the state.
const stateVersion = 1

const (
	// timeout bounds each request and its reply.
	timeout = 10 * time.Second
	// maxOffer bounds an offer, in bytes.
	maxOffer = 64 << 20
	// maxSockets bounds the number of sockets in an offer.
	maxSockets = 8
)
