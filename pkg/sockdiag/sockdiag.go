// Package sockdiag destroys TCP sockets by the kernel's sock_diag interface (sock_diag(7),
// linux/sock_diag.h).
package sockdiag

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// ErrUnsupported is the error of a kernel that cannot list or destroy TCP sockets, because
// CONFIG_INET_TCP_DIAG or CONFIG_INET_DIAG_DESTROY is off or a module is missing, or that does not
// permit it.
var ErrUnsupported = errors.New("the kernel does not destroy sockets")

// Names of linux/inet_diag.h.
const (
	getSocket = 18 // TCPDIAG_GETSOCK
	bytecode  = 1  // INET_DIAG_REQ_BYTECODE
	jump      = 1  // INET_DIAG_BC_JMP
	peerCond  = 8  // INET_DIAG_BC_D_COND
	anyPort   = 1<<32 - 1
)

// unsentStates are the TCP states, as bits, in which a socket can have data to send or retransmit:
// ESTABLISHED, FIN_WAIT1, CLOSE_WAIT, LAST_ACK and CLOSING (net/tcp_states.h).
const unsentStates = 1<<1 | 1<<4 | 1<<8 | 1<<9 | 1<<11

// timeout bounds Destroy, for which ADD and DEL wait. The kernel's table of connections can be long,
// and a process in another network namespace can hold the kernel's lock (sock_diag_mutex).
var timeout = 5 * time.Second

// Destroy begins to destroy the TCP sockets of the thread's network namespace that have one of the
// local ports, one of the peers, and possibly unsent data. It returns a function that waits for the
// end and returns how many sockets there were. For each, the kernel drops the queue, sends the peer
// a reset, and fails later writes. Sockets that no process has open are destroyed, too.
//
// The kernel filters by port and peer. For each port it reads its table of connections once, which
// takes up to half a millisecond with 262,144 buckets; so Destroy does not wait. The error is
// ErrUnsupported if the kernel lacks the interface. A kernel without CONFIG_INET_DIAG_DESTROY
// reports that only if there is a socket to destroy.
func Destroy(ports []uint16, peers []netip.Addr) (wait func() (destroyed int, err error)) {
	// Not in the goroutine: the connection belongs to the namespace of the calling thread.
	conn, err := netlink.Dial(unix.NETLINK_SOCK_DIAG, nil)
	if err != nil {
		return func() (int, error) { return 0, unsupported(err) }
	}
	if err := conn.SetDeadline(time.Now().Add(timeout)); err != nil {
		conn.Close()
		return func() (int, error) { return 0, err }
	}
	var destroyed int
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer conn.Close()
		destroyed, err = destroyAll(conn, ports, peers)
	}()
	return func() (int, error) {
		<-done
		return destroyed, err
	}
}

// maxPeers bounds the length of a filter.
const maxPeers = 64

func destroyAll(conn *netlink.Conn, ports []uint16, peers []netip.Addr) (destroyed int, err error) {
	for _, port := range ports {
		for some := range slices.Chunk(peers, maxPeers) {
			n, err := destroyConnections(conn, port, some)
			destroyed += n
			if err != nil {
				return destroyed, fmt.Errorf("sockets of port %d to %v: %w", port, some, unsupported(err))
			}
		}
	}
	return destroyed, nil
}

// destroyConnections destroys the sockets with this local port and one of the peers.
func destroyConnections(conn *netlink.Conn, port uint16, peers []netip.Addr) (destroyed int, err error) {
	sockets, err := dump(conn, port, peers)
	if err != nil {
		return 0, err
	}
	for _, s := range sockets {
		switch err := destroy(conn, s); {
		case err == nil:
			destroyed++
		case !errors.Is(err, unix.ENOENT): // ENOENT: it has ended since the dump
			return destroyed, err
		}
	}
	return destroyed, nil
}

// socket identifies a socket by its family and its struct inet_diag_sockid, which ends with a
// unique cookie.
type socket struct {
	family uint8
	id     [48]byte
}

// dump returns the sockets with this local port and one of the peers. It uses the older request
// (struct inet_diag_req), which returns all families (inet_diag_dump_compat in
// net/ipv4/inet_diag.c). With SOCK_DIAG_BY_FAMILY, IPv4 would need two dumps: the sockets of a
// dual-stack listener are AF_INET6 with IPv4-mapped addresses.
func dump(conn *netlink.Conn, port uint16, peers []netip.Addr) (sockets []socket, err error) {
	filter, err := netlink.MarshalAttributes([]netlink.Attribute{{Type: bytecode, Data: hasPeer(peers)}})
	if err != nil {
		return nil, err
	}
	request := make([]byte, 60)
	binary.BigEndian.PutUint16(request[4:], port) // idiag_sport; the rest of the socket's identity is no filter
	binary.NativeEndian.PutUint32(request[52:], unsentStates)
	messages, err := conn.Execute(netlink.Message{
		Header: netlink.Header{Type: getSocket, Flags: netlink.Request | netlink.Dump}, Data: append(request, filter...),
	})
	for _, m := range messages {
		if s := (socket{}); len(m.Data) >= 4+len(s.id) { // struct inet_diag_msg
			s.family = m.Data[0]
			copy(s.id[:], m.Data[4:])
			sockets = append(sockets, s)
		}
	}
	return sockets, err
}

// destroy destroys a socket by a struct inet_diag_req_v2. It needs CAP_NET_ADMIN. The kernel finds
// sockets with IPv4-mapped addresses by the family AF_INET6, as in the dump
// (inet_diag_find_one_icsk).
func destroy(conn *netlink.Conn, s socket) error {
	request := []byte{s.family, unix.IPPROTO_TCP, 0, 0, 0, 0, 0, 0}
	_, err := conn.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.SOCK_DESTROY, Flags: netlink.Request | netlink.Acknowledge}, Data: append(request, s.id[:]...),
	})
	return err
}

// hasPeer returns a filter that accepts sockets with one of the peers: a condition for each peer,
// followed by a jump to the end. An operation (struct inet_diag_bc_op) has the offsets of the next
// one if the condition is true and if it is false. A filter that ends at its length accepts, and
// one that ends four bytes later refuses. A condition (struct inet_diag_hostcond) of AF_INET is
// also true for IPv4 peers of AF_INET6 sockets (inet_diag_bc_run).
func hasPeer(peers []netip.Addr) (filter []byte) {
	const operation, condition = 4, 8
	for _, peer := range slices.Backward(peers) {
		family, address := uint8(unix.AF_INET), peer.AsSlice()
		if peer.Is6() {
			family = unix.AF_INET6
		}
		rest := filter
		if len(rest) > 0 { // a false condition continues after the jump
			rest = append(op(jump, operation, operation+len(rest)), rest...)
		}
		length := operation + condition + len(address)
		filter = op(peerCond, length, length+operation)
		filter = append(filter, family, uint8(8*len(address)), 0, 0)
		filter = binary.NativeEndian.AppendUint32(filter, anyPort)
		filter = append(append(filter, address...), rest...)
	}
	return filter
}

// op returns a struct inet_diag_bc_op.
func op(code uint8, met, unmet int) []byte {
	return binary.NativeEndian.AppendUint16([]byte{code, uint8(met)}, uint16(unmet))
}

// unsupported wraps the errors of kernels without sock_diag (EPROTONOSUPPORT), its part for TCP
// (ENOENT) or SOCK_DESTROY (EOPNOTSUPP), and of missing permissions, in ErrUnsupported.
func unsupported(err error) error {
	for _, lacking := range []error{unix.EPROTONOSUPPORT, unix.ENOENT, unix.EOPNOTSUPP, unix.EPERM, unix.EACCES} {
		if errors.Is(err, lacking) {
			return fmt.Errorf("%w: %w", ErrUnsupported, err)
		}
	}
	return err
}
