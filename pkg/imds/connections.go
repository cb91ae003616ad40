package imds

import (
	"math"
	"net/netip"
	"sync"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/ratelimit"
)

// Connections limits the open connections of each source and of all sources together, and the
// requests of each source, of which a new connection is one. Several Listeners may share one.
//
// When all connections are in use, a new one replaces a connection of the source that has the most,
// unless its own source would then have as many. So a source with fewer connections than an equal
// share of the total, less one, is never refused and never loses one.
type Connections struct {
	total, each int
	requests    *ratelimit.Keyed[netip.Addr]

	mu   sync.Mutex
	open map[netip.Addr]map[*conn]bool
	len  int
}

const (
	// maxConnections is more than a pod needs: an SDK keeps at most one connection per process.
	maxConnections = 256
	// maxAllConnections keeps the proxy's memory within its DaemonSet's request: a connection costs up to
	// 30 KB. The benchmark measures it as rss_mib_hostile.
	maxAllConnections = 512
)

// NewConnections returns a Connections without connections. A source may make requestsPerSecond requests;
// zero is no limit.
func NewConnections(requestsPerSecond float64) *Connections {
	return &Connections{total: maxAllConnections, each: maxConnections, requests: newRequestLimit(requestsPerSecond), open: make(map[netip.Addr]map[*conn]bool)}
}

// add counts c as open. It returns false if c must be refused. The caller must close replaced, which no longer
// counts, unless it is nil.
func (cs *Connections) add(c *conn) (replaced *conn, ok bool) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	own := len(cs.open[c.source])
	if own >= cs.each {
		return nil, false
	}
	if cs.len >= cs.total {
		most := cs.largest()
		if own+1 >= len(cs.open[most]) {
			return nil, false
		}
		replaced = idlest(cs.open[most])
		cs.drop(replaced)
	}
	if cs.open[c.source] == nil {
		cs.open[c.source] = make(map[*conn]bool)
	}
	cs.open[c.source][c] = true
	cs.len++
	return replaced, true
}

// remove counts c as closed. A second call does nothing.
func (cs *Connections) remove(c *conn) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	cs.drop(c)
}

func (cs *Connections) drop(c *conn) {
	if !cs.open[c.source][c] {
		return
	}
	cs.len--
	if delete(cs.open[c.source], c); len(cs.open[c.source]) == 0 {
		delete(cs.open, c.source)
	}
}

// largest returns the source that has the most connections.
func (cs *Connections) largest() (most netip.Addr) {
	for source, conns := range cs.open {
		if len(conns) > len(cs.open[most]) {
			most = source
		}
	}
	return most
}

// idlest returns the connection whose client has the least time left to send its next request. It returns a
// connection with a request in progress only if all have one.
func idlest(conns map[*conn]bool) (least *conn) {
	first := int64(math.MaxInt64)
	for c := range conns {
		by := c.readBy.Load()
		if by == 0 {
			by = math.MaxInt64
		}
		if least == nil || by < first {
			least, first = c, by
		}
	}
	return least
}
