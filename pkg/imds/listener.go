package imds

import (
	"log/slog"
	"net"
	"net/netip"
	"time"
)

// Destinations reports whether a connection from source to destination is one that this node's
// rules redirect to the proxy.
type Destinations func(source netip.Addr, destination netip.AddrPort) bool

// Holder returns the identity of the pod that holds a source address now, or an empty string if the
// pod is not known.
type Holder func(source netip.Addr) string

// Listener accepts only connections that this node's rules redirected. It asks the kernel for the
// original destination of each connection and resets a connection to the proxy itself before it
// reads a byte. So no client on the network can connect to the proxy and forge a pod's address.
//
// A connection belongs to the pod that held its source address when it was accepted. It is reset
// once another pod holds the address. A connection beyond a limit of Connections is reset.
type Listener struct {
	net.Listener
	isRedirected Destinations
	holder       Holder
	connections  *Connections
	refused      func()
	log          *slog.Logger
}

// NewListener returns a Listener over a TCP listener. It calls refused for each connection that it
// refuses, that it closes in favour of another pod's, or that it resets because another pod holds
// the address.
func NewListener(l net.Listener, isRedirected Destinations, holder Holder, cs *Connections, refused func(), log *slog.Logger) *Listener {
	return &Listener{Listener: l, isRedirected: isRedirected, holder: holder, connections: cs, refused: refused, log: log}
}

// Accept implements net.Listener.
func (l *Listener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		tcp := c.(*net.TCPConn)
		source := addrPort(tcp.RemoteAddr())
		destination, err := originalDestination(tcp)
		accepted := &conn{TCPConn: tcp, listener: l, source: source.Addr()}
		switch {
		case err != nil || !l.isRedirected(source.Addr(), destination):
			l.log.Debug("connection refused: it was not redirected", "source", source, "destination", destination, "error", err)
		case !accepted.reserveFirst(time.Now()):
			l.log.Debug("connection refused: its pod makes too many", "source", source)
		case !l.admit(accepted):
			l.log.Debug("connection refused: its pod has too many", "source", source)
		default:
			boundWrites(tcp)
			accepted.claim(l.holder(accepted.source))
			return accepted, nil
		}
		l.refused()
		tcp.SetLinger(0) // the client gets a reset instead of waiting for a timeout
		accepted.Close()
	}
}

// admit counts c as open, and closes the connection that c replaces.
func (l *Listener) admit(c *conn) bool {
	replaced, ok := l.connections.add(c)
	if replaced != nil {
		l.log.Debug("connection closed: another pod has fewer", "source", replaced.source, "other", c.source)
		l.refused()
		replaced.Close()
	}
	return ok
}

// Len returns the number of open connections of all listeners that share the limits.
func (l *Listener) Len() int { return l.connections.Len() }
