package imds

import (
	"maps"
	"net/netip"
	"slices"
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
	open  map[*conn]bool
	count map[netip.Addr]int // of open connections
	sweep *time.Timer        // nil while no connection is open
}

const (
	// maxSourceConnections exceeds what a pod needs: an SDK keeps at most one connection per
	// process.
	maxSourceConnections = 256
	// maxConnections keeps the proxy's memory within its DaemonSet's request: a connection costs up
	// to 30 KB. The benchmark measures it as rss_mib_hostile.
	maxConnections = 512
)

// NewConnections returns a Connections without connections. A source may make requestsPerSecond
// requests; zero is no limit.
func NewConnections(requestsPerSecond float64) *Connections {
	return &Connections{
		total: maxConnections, perSource: maxSourceConnections, requests: newRequestLimit(requestsPerSecond),
		sweepInterval: time.Second, open: make(map[*conn]bool), count: make(map[netip.Addr]int),
	}
}

// Len returns the number of open connections.
func (cs *Connections) Len() int {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	return len(cs.open)
}

// add counts c as open. It returns false if c must be refused. The caller must close replaced,
// which no longer counts, unless it is nil.
func (cs *Connections) add(c *conn) (replaced *conn, ok bool) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	n := cs.count[c.source]
	if n >= cs.perSource {
		return nil, false
	}
	if len(cs.open) >= cs.total {
		largest := cs.largestSource()
		if n+1 >= cs.count[largest] {
			return nil, false
		}
		replaced = cs.leastBusy(largest)
		cs.drop(replaced)
	}
	cs.open[c] = true
	cs.count[c.source]++
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
	if !cs.open[c] {
		return
	}
	delete(cs.open, c)
	if cs.count[c.source]--; cs.count[c.source] == 0 {
		delete(cs.count, c.source)
	}
}

// largestSource returns the source that has the most connections.
func (cs *Connections) largestSource() (largest netip.Addr) {
	for source, n := range cs.count {
		if n > cs.count[largest] {
			largest = source
		}
	}
	return largest
}

// leastBusy returns a connection of the source. It returns one with a request in progress only if
// all have one.
func (cs *Connections) leastBusy(source netip.Addr) (found *conn) {
	for c := range cs.open {
		if c.source != source {
			continue
		}
		if found = c; !c.isBusy.Load() {
			break
		}
	}
	return found
}

// resetStale resets the connections whose source address has another holder, and schedules itself
// again while connections are open. Write checks the holder too, but an idle connection, or one
// that waits for its answer, must not outlive its pod.
func (cs *Connections) resetStale() {
	cs.mu.Lock()
	open := slices.Collect(maps.Keys(cs.open))
	cs.mu.Unlock()
	for _, c := range open {
		c.resetIfHeldByAnother()
	}
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if len(cs.open) == 0 {
		cs.sweep = nil
		return
	}
	cs.sweep.Reset(cs.sweepInterval)
}
