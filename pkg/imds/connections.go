package imds

import (
	"math"
	"net/netip"
	"sync"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/ratelimit"
)

// Connections limits the open connections of each source and of all sources together, and the
// requests of each source, of which a new connection is one. Several Listeners may share one.
//
// When all connections are in use, a new one replaces a connection of the source that has the most,
// unless its own source would then have as many. So a source with fewer connections than an equal
// share of the total, less one, is never refused and never loses one.
//
// Once a second, Connections resets the connections whose source address has another holder.
type Connections struct {
	total, perSource int
	requests         *ratelimit.Keyed[netip.Addr]
	sweepInterval    time.Duration

	mu    sync.Mutex
	open  map[netip.Addr]map[*conn]*Listener
	len   int
	sweep *time.Timer // nil while no connection is open
}

const (
	// maxSourceConnections exceeds what a pod needs: an SDK keeps at most one connection per process.
	maxSourceConnections = 256
	// maxConnections keeps the proxy's memory within its DaemonSet's request: a connection costs up to
	// 30 KB. The benchmark measures it as rss_mib_hostile.
	maxConnections = 512
)

// NewConnections returns a Connections without connections. A source may make requestsPerSecond
// requests; zero is no limit.
func NewConnections(requestsPerSecond float64) *Connections {
	return &Connections{
		total: maxConnections, perSource: maxSourceConnections, requests: newRequestLimit(requestsPerSecond),
		sweepInterval: time.Second, open: make(map[netip.Addr]map[*conn]*Listener),
	}
}

// add counts c, which l accepted, as open. It returns false if c must be refused. The caller must
// close replaced, which no longer counts, unless it is nil.
func (cs *Connections) add(c *conn, l *Listener) (replaced *conn, ok bool) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	n := len(cs.open[c.source])
	if n >= cs.perSource {
		return nil, false
	}
	if cs.len >= cs.total {
		largest := cs.largestSource()
		if n+1 >= len(cs.open[largest]) {
			return nil, false
		}
		replaced = earliestDeadline(cs.open[largest])
		cs.drop(replaced)
	}
	if cs.open[c.source] == nil {
		cs.open[c.source] = make(map[*conn]*Listener)
	}
	cs.open[c.source][c] = l
	cs.len++
	if cs.sweep == nil {
		cs.sweep = time.AfterFunc(cs.sweepInterval, cs.resetStale)
	}
	return replaced, true
}

// remove counts c as closed. A second call does nothing.
func (cs *Connections) remove(c *conn) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	cs.drop(c)
}

func (cs *Connections) drop(c *conn) {
	if _, ok := cs.open[c.source][c]; !ok {
		return
	}
	cs.len--
	if delete(cs.open[c.source], c); len(cs.open[c.source]) == 0 {
		delete(cs.open, c.source)
	}
}

// count returns the number of open connections that l accepted.
func (cs *Connections) count(l *Listener) (n int) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	for _, conns := range cs.open {
		for _, accepted := range conns {
			if accepted == l {
				n++
			}
		}
	}
	return n
}

// largestSource returns the source that has the most connections.
func (cs *Connections) largestSource() (largest netip.Addr) {
	for source, conns := range cs.open {
		if len(conns) > len(cs.open[largest]) {
			largest = source
		}
	}
	return largest
}

// earliestDeadline returns the connection whose client has the least time left to send its next
// request. It returns a connection with a request in progress only if all have one.
func earliestDeadline(conns map[*conn]*Listener) (earliest *conn) {
	least := int64(math.MaxInt64)
	for c := range conns {
		deadline := c.readDeadline.Load()
		if deadline == 0 {
			deadline = math.MaxInt64
		}
		if earliest == nil || deadline < least {
			earliest, least = c, deadline
		}
	}
	return earliest
}

// resetStale resets the connections whose source address has another holder, and schedules itself
// again while connections are open. Write checks the holder too, but an idle connection, or one that
// waits for its answer, must not outlive its pod.
func (cs *Connections) resetStale() {
	for source, conns := range cs.bySource() {
		holder := conns[0].currentHolder(source)
		for _, c := range conns {
			c.resetIfHeldByAnother(holder)
		}
	}
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if cs.len == 0 {
		cs.sweep = nil
		return
	}
	cs.sweep.Reset(cs.sweepInterval)
}

func (cs *Connections) bySource() map[netip.Addr][]*conn {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	all := make(map[netip.Addr][]*conn, len(cs.open))
	for source, conns := range cs.open {
		for c := range conns {
			all[source] = append(all[source], c)
		}
	}
	return all
}
