package imds

import (
	"math"
	"net/netip"
	"sync"
)

// Connections bounds how many connections each source has open, and all together. Several Listeners may share one.
//
// At the total, a new connection takes the place of one of the source that has most, if its own source still has fewer afterwards. So a
// source is never refused while it has fewer than an equal share of the total, less one, and it loses none that it has within that.
type Connections struct {
	total, each int

	mu   sync.Mutex
	open map[netip.Addr]map[*conn]bool
	len  int
}

const (
	// maxConnections is more than the processes of a pod have with it, whose SDKs keep one each at most.
	maxConnections = 256
	// maxAllConnections bounds the proxy's memory, which stays within what its DaemonSet requests (rss_mib_hostile of the benchmark): each
	// connection costs up to 30 KB.
	maxAllConnections = 512
)

// NewConnections has no connection yet.
func NewConnections() *Connections {
	return &Connections{total: maxAllConnections, each: maxConnections, open: make(map[netip.Addr]map[*conn]bool)}
}

// add counts c as open. ok is false where c has to be refused. Where replaced is not nil, the caller must close it: it no longer counts.
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

// largest returns the source with most connections.
func (cs *Connections) largest() (most netip.Addr) {
	for source, conns := range cs.open {
		if len(conns) > len(cs.open[most]) {
			most = source
		}
	}
	return most
}

// idlest returns the connection whose client has least time left to send its next request. It returns one with a request in progress only if
// all have one.
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
