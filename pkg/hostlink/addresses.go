package hostlink

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// maxAddresses bounds the addresses of an interface in a pod: a pod with NET_ADMIN can give itself
// any number.
const maxAddresses = 256

// ErrAddresses is the error of an interface with more addresses than that.
var ErrAddresses = fmt.Errorf("more than %d addresses", maxAddresses)

// addresses returns the addresses of the interface with that index in a namespace, in the kernel's
// order, without loopback and IPv6 link-local ones. The error is ErrAddresses if there are too
// many.
func addresses(pod netns.NsHandle, index int) ([]netip.Addr, error) {
	return dump(func() ([]netip.Addr, error) {
		socket, err := nl.GetNetlinkSocketAt(pod, netns.None(), unix.NETLINK_ROUTE)
		if err != nil {
			return nil, err
		}
		defer socket.Close() // also ends a dump that is not read to its end
		if err := socket.SetReceiveTimeout(&nl.SocketTimeoutTv); err != nil {
			return nil, err
		}
		// With strict checking the kernel lists the addresses of one interface. Linux before 4.20
		// has no such option, and addresses of other interfaces count, too.
		unix.SetsockoptInt(socket.GetFd(), unix.SOL_NETLINK, unix.NETLINK_GET_STRICT_CHK, 1)
		var ips []netip.Addr
		read := 0
		for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
			err := dumpAddresses(socket, family, index, func(message []byte) error {
				if read++; read > maxAddresses {
					return ErrAddresses
				}
				ip, err := address(message, family, index)
				if ip.IsValid() && !ip.IsLoopback() && !(ip.Is6() && ip.IsLinkLocalUnicast()) {
					ips = append(ips, ip)
				}
				return err
			})
			if err != nil {
				return nil, err
			}
		}
		return ips, nil
	})
}

// dumpAddresses calls each with every RTM_NEWADDR message of an interface, and stops at its first
// error. An interface that is unknown to the family has no addresses.
func dumpAddresses(socket *nl.NetlinkSocket, family, index int, each func(message []byte) error) error {
	request := nl.NewNetlinkRequest(unix.RTM_GETADDR, unix.NLM_F_DUMP)
	of := nl.NewIfAddrmsg(family)
	of.Index = uint32(index)
	request.AddData(of)
	if err := socket.Send(request); err != nil {
		return err
	}
	interrupted := false
	for {
		messages, _, err := socket.Receive()
		if err != nil {
			return err
		}
		for _, m := range messages {
			interrupted = interrupted || m.Header.Flags&unix.NLM_F_DUMP_INTR != 0
			switch m.Header.Type {
			case unix.NLMSG_DONE, unix.NLMSG_ERROR:
				if len(m.Data) >= 4 {
					if errno := -int32(binary.NativeEndian.Uint32(m.Data)); errno != 0 && unix.Errno(errno) != unix.ENODEV {
						return unix.Errno(errno)
					}
				}
				if interrupted {
					return netlink.ErrDumpInterrupted
				}
				return nil
			case unix.RTM_NEWADDR:
				if err := each(m.Data); err != nil {
					return err
				}
			}
		}
	}
}

// address returns the address of a message, or the zero Addr if it is of another family or
// interface. A kernel without IPv6 answers a request for IPv6 with all families.
func address(message []byte, family, index int) (netip.Addr, error) {
	if len(message) < unix.SizeofIfAddrmsg {
		return netip.Addr{}, errors.New("netlink: a short address")
	}
	of := nl.DeserializeIfAddrmsg(message)
	if int(of.Family) != family || int(of.Index) != index {
		return netip.Addr{}, nil
	}
	attributes, err := nl.ParseRouteAttr(message[unix.SizeofIfAddrmsg:])
	if err != nil {
		return netip.Addr{}, fmt.Errorf("netlink attributes: %w", err)
	}
	var ip netip.Addr
	for _, a := range attributes {
		// IFA_ADDRESS is the peer's where there is an IFA_LOCAL (linux/if_addr.h).
		if t := a.Attr.Type; t == unix.IFA_LOCAL || t == unix.IFA_ADDRESS && !ip.IsValid() {
			ip, _ = netip.AddrFromSlice(a.Value)
		}
	}
	return ip.Unmap(), nil
}
