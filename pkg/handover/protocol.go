// Package handover replaces a process that serves TCP sockets by another one without refusing a
// connection. The sockets and a state change hands over a unix socket.
//
// A successor asks for the state and the sockets, accepts on the sockets, and commits. Only then does
// the predecessor stop accepting. Either process accepts a connection that is dialled in between. The
// predecessor keeps its sockets open until it ends, and accepts again if its successor ends first.
package handover

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// stateVersion is the version of the state. It changes with the meaning of one of its fields. A
// successor that does not know the version starts without the state, and takes the sockets over.
const stateVersion = 1

// The requests of a successor, one byte each. A message that changes gets another byte: the predecessor
// closes the connection after a request that it does not know.
const (
	requestState   = 'c' // the reply's payload is the version of the state in one byte, and the state
	requestSockets = 's' // the payload is a JSON array of names; the control message has a socket for each
	requestCommit  = 'a' // an empty reply, once the predecessor has stopped accepting
)

const (
	// timeout bounds each request and its reply.
	timeout = 10 * time.Second
	// maxPayload bounds a reply, in bytes.
	maxPayload = 64 << 20
	// maxSockets bounds the number of sockets in a reply.
	maxSockets = 8
)

// headerSize is the size of a reply's header: the request, and the payload's length, big-endian.
const headerSize = 1 + 8

// writeReply writes a reply with descriptors of files (unix(7), SCM_RIGHTS).
func writeReply(c *net.UnixConn, request byte, payload []byte, fds ...int) error {
	header := binary.BigEndian.AppendUint64([]byte{request}, uint64(len(payload)))
	var control []byte
	if len(fds) > 0 {
		control = unix.UnixRights(fds...)
	}
	if _, _, err := c.WriteMsgUnix(header, control, nil); err != nil {
		return err
	}
	_, err := c.Write(payload)
	return err
}

// readReply reads the reply to a request. The caller closes the files, also after an error.
func readReply(c *net.UnixConn, request byte) (payload []byte, files []*os.File, err error) {
	header, control := make([]byte, headerSize), make([]byte, unix.CmsgSpace(maxSockets*4))
	n, controlLen, flags, _, err := c.ReadMsgUnix(header, control)
	if err != nil {
		return nil, nil, err
	}
	messages, err := unix.ParseSocketControlMessage(control[:controlLen])
	if err != nil {
		return nil, nil, err
	}
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			continue // another type of control message
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "socket"))
		}
	}
	switch length := binary.BigEndian.Uint64(header[1:]); {
	case n != headerSize || header[0] != request || flags&unix.MSG_CTRUNC != 0:
		return nil, files, fmt.Errorf("malformed reply of %d bytes to the request %q, flags %#x", n, request, flags)
	case length > maxPayload:
		return nil, files, fmt.Errorf("reply of %d bytes, more than %d", length, maxPayload)
	default:
		payload = make([]byte, length)
	}
	_, err = io.ReadFull(c, payload)
	return payload, files, err
}
