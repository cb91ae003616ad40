package hostlink

import (
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// maxAddresses bounds the addresses of an interface in a pod: a pod with NET_ADMIN can give itself
// any number.
const maxAddresses = 256

// ErrAddresses is the error of an interface with more than maxAddresses addresses.
var ErrAddresses = fmt.Errorf("more than %d addresses", maxAddresses)

// addresses returns the addresses of the interface with that index in a namespace, in the kernel's
// order, without loopback and IPv6 link-local ones. The error is ErrAddresses if there are too
// many.
func addresses(pod netns.NsHandle, index int) ([]netip.Addr, error) {
	return Dump(func() (ips []netip.Addr, err error) {
		socket, err := nl.GetNetlinkSocketAt(pod, netns.None(), unix.NETLINK_ROUTE)
		if err != nil {
			return nil, err
		}
		defer socket.Close()
		if err := socket.SetReceiveTimeout(&nl.SocketTimeoutTv); err != nil {
			return nil, err
		}
		// With strict checking the kernel lists only the addresses of this interface. Linux before
		// 4.20 has no such option. There the addresses of all interfaces count towards the limit.
		unix.SetsockoptInt(socket.GetFd(), unix.SOL_NETLINK, unix.NETLINK_GET_STRICT_CHK, 1)
		request := nl.NewNetlinkRequest(unix.RTM_GETADDR, unix.NLM_F_DUMP)
		request.Sockets = map[int]*nl.SocketHandle{unix.NETLINK_ROUTE: {Socket: socket}}
		of := nl.NewIfAddrmsg(unix.AF_UNSPEC)
		of.Index = uint32(index)
		request.AddData(of)
		read := 0
		var invalid error
		err = request.ExecuteIter(unix.NETLINK_ROUTE, unix.RTM_NEWADDR, func(message []byte) bool {
			if read++; read > maxAddresses {
				invalid = ErrAddresses
				socket.Close() // ends the dump, which ExecuteIter would read to its end
				return false
			}
			var ip netip.Addr
			ip, invalid = address(message, index)
			if ip.IsValid() && !ip.IsLoopback() && !(ip.Is6() && ip.IsLinkLocalUnicast()) {
				ips = append(ips, ip)
			}
			return invalid == nil
		})
		if invalid != nil {
			return nil, invalid
		}
		return ips, err
	})
}

// address returns the address in an RTM_NEWADDR message, or the zero Addr if the message is about
// another interface.
func address(message []byte, index int) (ip netip.Addr, err error) {
	if int(nl.DeserializeIfAddrmsg(message).Index) != index {
		return netip.Addr{}, nil
	}
	attributes, err := nl.ParseRouteAttr(message[unix.SizeofIfAddrmsg:])
	for _, a := range attributes {
		// If there is an IFA_LOCAL, IFA_ADDRESS is the address of the peer (linux/if_addr.h).
		if t := a.Attr.Type; t == unix.IFA_LOCAL || t == unix.IFA_ADDRESS && !ip.IsValid() {
			ip, _ = netip.AddrFromSlice(a.Value)
		}
	}
	return ip.Unmap(), err
}
