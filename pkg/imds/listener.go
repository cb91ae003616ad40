package imds

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Destinations tells whether a connection from source that was bound for destination is one that was redirected here.
type Destinations func(source netip.Addr, destination netip.AddrPort) bool

// Holder returns what identifies the pod that holds a source address now, or an empty string where that is not known.
type Holder func(source netip.Addr) string

// Listener accepts only connections that this node's rules redirected: it asks the kernel where each was bound for
// originally, and what was dialled here directly is reset before a byte is read. So nobody on the network can dial the proxy
// and claim an address.
//
// A connection belongs to the pod that held its source address when it was accepted. It is reset once another pod holds the
// address.
//
// Connections limits the connections. One beyond a limit is reset.
type Listener struct {
	net.Listener
	allowed Destinations
	holder  Holder
	refused func()
	log     *slog.Logger
	pods    *Connections
	open    *open
}

// NewListener returns a Listener over a TCP listener. refused is called for each connection that is refused, that is
// closed in favour of another pod's, or that is reset because another pod holds its address.
func NewListener(l net.Listener, allowed Destinations, holder Holder, pods *Connections, refused func(), log *slog.Logger) *Listener {
	return &Listener{Listener: l, allowed: allowed, holder: holder, refused: refused, log: log, pods: pods, open: newOpen(holder)}
}

// Accept implements net.Listener.
func (l *Listener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		tcp, ok := c.(*net.TCPConn)
		if !ok {
			c.Close()
			return nil, fmt.Errorf("accepted a %T, not a TCP connection", c)
		}
		source := addrPort(tcp.RemoteAddr())
		destination, err := originalDestination(tcp)
		accepted := l.newConn(tcp, source)
		switch {
		case err != nil || !l.allowed(source.Addr(), destination):
			l.log.Debug("connection refused: it was not redirected", "source", source, "destination", destination, "error", err)
		case !accepted.reserve(time.Now()):
			l.log.Debug("connection refused: its pod makes too many", "source", source)
		case !l.admit(accepted):
			l.log.Debug("connection refused: its pod has too many", "source", source)
		default:
			boundWrites(tcp)
			accepted.claim(l.holder(accepted.source))
			return accepted, nil
		}
		l.refused()
		tcp.SetLinger(0) // the client gets a reset at once instead of waiting for a timeout
		accepted.Close()
	}
}

func (l *Listener) newConn(tcp *net.TCPConn, source netip.AddrPort) *conn {
	c := &conn{TCPConn: tcp, source: source.Addr(), requests: l.pods.requests, holderOf: l.holder}
	c.closed = sync.OnceFunc(func() {
		l.open.remove(c)
		l.pods.remove(c)
	})
	c.otherHolder = sync.OnceFunc(func() {
		l.log.Debug("connection reset: another pod holds its address", "source", source)
		l.refused()
	})
	return c
}

// admit counts c as open, and closes the connection that c replaces.
func (l *Listener) admit(c *conn) bool {
	l.open.add(c) // first: another Listener may close c as soon as it counts
	replaced, ok := l.pods.add(c)
	if replaced != nil {
		l.log.Debug("connection closed: another pod has fewer", "source", replaced.source, "other", c.source)
		l.refused()
		replaced.Close()
	}
	return ok
}

// Len is how many connections are open.
func (l *Listener) Len() int { return l.open.len() }

// ackTimeout is how long sent data may stay unacknowledged, and the pod's window closed, before the kernel ends the
// connection. AWS SDKs wait one second for the metadata service by default (AWS SDKs and Tools Reference Guide,
// "AWS_METADATA_SERVICE_TIMEOUT"), and read nothing of the connection later.
const ackTimeout = time.Second

// boundWrites has the kernel bound what net/http's WriteTimeout would, once for a connection and not by a timer for each
// answer. (tcp(7), TCP_USER_TIMEOUT, which covers a window that stays closed too.)
func boundWrites(c *net.TCPConn) {
	raw, err := c.SyscallConn()
	if err != nil {
		return
	}
	raw.Control(func(fd uintptr) {
		unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(ackTimeout.Milliseconds()))
	})
}

type connKey struct{}

// ConnContext is the http.Server.ConnContext that hands a connection to the Handler.
func ConnContext(ctx context.Context, c net.Conn) context.Context {
	if c, ok := c.(*conn); ok {
		return context.WithValue(ctx, connKey{}, c)
	}
	return ctx
}

func connOf(ctx context.Context) (*conn, bool) {
	c, ok := ctx.Value(connKey{}).(*conn)
	return c, ok
}

func sourceOf(ctx context.Context) (netip.Addr, bool) {
	if c, ok := connOf(ctx); ok {
		return c.source, true
	}
	return netip.Addr{}, false
}

func addrPort(a net.Addr) netip.AddrPort {
	t, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	ap := t.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port())
}

// originalDestination is where a connection was bound for before a rule redirected it, and its local address where none did:
// what conntrack says (SO_ORIGINAL_DST, linux/netfilter_ipv4.h, and its twin for IPv6).
func originalDestination(c *net.TCPConn) (netip.AddrPort, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return netip.AddrPort{}, err
	}
	four := addrPort(c.LocalAddr()).Addr().Is4()
	var destination netip.AddrPort
	var sockErr error
	err = raw.Control(func(fd uintptr) {
		if four {
			// struct sockaddr_in, read by way of the one call of this shape: family, port, address.
			var m *unix.IPv6Mreq
			if m, sockErr = unix.GetsockoptIPv6Mreq(int(fd), unix.SOL_IP, unix.SO_ORIGINAL_DST); sockErr == nil {
				b := m.Multiaddr
				destination = netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), binary.BigEndian.Uint16(b[2:4]))
			}
			return
		}
		// struct sockaddr_in6 leads the structure that this call fills.
		var info *unix.IPv6MTUInfo
		if info, sockErr = unix.GetsockoptIPv6MTUInfo(int(fd), unix.SOL_IPV6, unix.SO_ORIGINAL_DST); sockErr == nil {
			var port [2]byte
			binary.NativeEndian.PutUint16(port[:], info.Addr.Port)
			destination = netip.AddrPortFrom(netip.AddrFrom16(info.Addr.Addr), binary.BigEndian.Uint16(port[:]))
		}
	})
	if err == nil {
		err = sockErr
	}
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOPROTOOPT) {
		// Nothing tracks connections here, so nothing redirected this one.
		return addrPort(c.LocalAddr()), nil
	}
	return destination, err
}
