// Package sockdiag destroys TCP sockets by the kernel's sock_diag interface (sock_diag(7),
// linux/sock_diag.h).
package sockdiag

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"syscall"
	"time"

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
	d, err := open() // not in the goroutine: the socket belongs to the namespace of the calling thread
	if err != nil {
		return func() (int, error) { return 0, err }
	}
	var destroyed int
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer d.close()
		destroyed, err = d.destroyPeers(ports, peers)
	}()
	return func() (int, error) {
		<-done
		return destroyed, err
	}
}

func (d *diag) destroyPeers(ports []uint16, peers []netip.Addr) (destroyed int, err error) {
	for _, port := range ports {
		for some := range slices.Chunk(peers, maxPeers) {
			n, err := d.destroyAll(port, some)
			destroyed += n
			if err != nil {
				return destroyed, fmt.Errorf("sockets of port %d to %v: %w", port, some, err)
			}
		}
	}
	return destroyed, nil
}

// maxPeers bounds the length of a filter.
const maxPeers = 64

// socket identifies a socket by its family and its struct inet_diag_sockid, which ends with a
// unique cookie.
type socket struct {
	family uint8
	id     [48]byte
}

// diag is a netlink socket of NETLINK_SOCK_DIAG.
type diag struct {
	fd     int
	seq    uint32
	buffer []byte
}

func open() (*diag, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return nil, unsupported(err)
	}
	d := &diag{fd: fd, buffer: make([]byte, 64<<10)} // a dump's messages have at most 32 KiB
	patience := unix.NsecToTimeval(int64(5 * time.Second))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &patience); err != nil {
		d.close()
		return nil, err
	}
	return d, nil
}

func (d *diag) close() { unix.Close(d.fd) }

// destroyAll destroys the sockets with this local port and one of the peers.
func (d *diag) destroyAll(port uint16, peers []netip.Addr) (destroyed int, err error) {
	sockets, err := d.dump(port, peers)
	if err != nil {
		return 0, unsupported(err)
	}
	for _, s := range sockets {
		switch err := d.destroy(s); {
		case err == nil:
			destroyed++
		case !errors.Is(err, unix.ENOENT): // ENOENT: it has ended since the dump
			return destroyed, unsupported(err)
		}
	}
	return destroyed, nil
}

// dump returns the sockets with this local port and one of the peers. It uses the older request
// (struct inet_diag_req), which returns all families (inet_diag_dump_compat in
// net/ipv4/inet_diag.c). With SOCK_DIAG_BY_FAMILY, IPv4 would need two dumps: the sockets of a
// dual-stack listener are AF_INET6 with IPv4-mapped addresses.
func (d *diag) dump(port uint16, peers []netip.Addr) (sockets []socket, err error) {
	request := make([]byte, 4, 60)
	request = binary.BigEndian.AppendUint16(request, port) // idiag_sport; the rest of the socket's identity is no filter
	request = append(request, make([]byte, 46)...)
	request = binary.NativeEndian.AppendUint32(request, unsentStates)
	request = binary.NativeEndian.AppendUint32(request, 0)
	err = d.ask(getSocket, unix.NLM_F_DUMP, append(request, attribute(bytecode, hasPeer(peers))...), func(data []byte) {
		if s := (socket{}); len(data) >= 4+len(s.id) { // struct inet_diag_msg
			s.family = data[0]
			copy(s.id[:], data[4:])
			sockets = append(sockets, s)
		}
	})
	return sockets, err
}

// destroy destroys a socket by a struct inet_diag_req_v2. It needs CAP_NET_ADMIN. The kernel finds
// sockets with IPv4-mapped addresses by the family AF_INET6, as in the dump
// (inet_diag_find_one_icsk).
func (d *diag) destroy(s socket) error {
	request := []byte{s.family, unix.IPPROTO_TCP, 0, 0, 0, 0, 0, 0}
	return d.ask(unix.SOCK_DESTROY, unix.NLM_F_ACK, append(request, s.id[:]...), func([]byte) {})
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

func attribute(kind uint16, data []byte) []byte {
	b := binary.NativeEndian.AppendUint16(nil, uint16(4+len(data)))
	return append(binary.NativeEndian.AppendUint16(b, kind), data...)
}

// ask sends a request and reads the complete answer.
func (d *diag) ask(kind uint16, flags int, request []byte, each func(data []byte)) error {
	d.seq++
	b := binary.NativeEndian.AppendUint32(nil, uint32(unix.SizeofNlMsghdr+len(request)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = binary.NativeEndian.AppendUint16(b, uint16(unix.NLM_F_REQUEST|flags))
	b = binary.NativeEndian.AppendUint32(b, d.seq)
	b = binary.NativeEndian.AppendUint32(b, 0)
	if err := unix.Sendto(d.fd, append(b, request...), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	for {
		n, _, err := unix.Recvfrom(d.fd, d.buffer, 0)
		if err == unix.EINTR { // also with SA_RESTART, because the socket has a timeout (signal(7))
			continue
		}
		if err != nil {
			return err
		}
		messages, err := syscall.ParseNetlinkMessage(d.buffer[:n])
		if err != nil {
			return err
		}
		for _, m := range messages {
			switch {
			case m.Header.Seq != d.seq:
			case m.Header.Type == unix.NLMSG_ERROR, m.Header.Type == unix.NLMSG_DONE:
				if len(m.Data) < 4 {
					return nil
				}
				if errno := -int32(binary.NativeEndian.Uint32(m.Data)); errno > 0 {
					return unix.Errno(errno)
				}
				return nil
			default:
				each(m.Data)
			}
		}
	}
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
