package imds

import (
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/ratelimit"
)

const (
	// maxExchanges limits the concurrent exchanges with the metadata service, which serves the
	// whole node.
	maxExchanges = 16
	// maxPodExchanges is how many of them one pod may have.
	maxPodExchanges = 4
	// podRate and podBurst limit the requests of one pod. The service allows a node 1024 packets a
	// second for metadata, DNS and NTP together (Amazon VPC User Guide, "Amazon DNS server",
	// quotas).
	podRate, podBurst = 10, 50
	// nodeRate limits the requests of all pods: an exchange is two packets and their
	// acknowledgements.
	nodeRate = 200
)

var (
	errPodExchanges = unavailable("it asks for more than %d other metadata at a time", maxPodExchanges)
	errPodRate      = unavailable("it asks for other metadata more than %d times a second", podRate)
	errNodeRate     = unavailable("the pods of this node ask for other metadata more than %d times a second", nodeRate)
)

// upstreamLimit limits the requests to the node's metadata service, for each pod by its address and
// for all pods together.
type upstreamLimit struct {
	pods *ratelimit.Keyed[netip.Addr]
	node *rate.Limiter

	mu     sync.Mutex
	active map[netip.Addr]int // exchanges in progress
}

func newUpstreamLimit() *upstreamLimit {
	return &upstreamLimit{
		pods: ratelimit.NewKeyed[netip.Addr](podRate, podBurst), node: rate.NewLimiter(nodeRate, nodeRate),
		active: make(map[netip.Addr]int),
	}
}

// begin starts an exchange of the source. If it returns no error, the caller must call end.
func (l *upstreamLimit) begin(source netip.Addr) error {
	now := time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.active[source] >= maxPodExchanges:
		return errPodExchanges
	case !l.pods.Allow(source, now):
		return errPodRate
	case !l.node.AllowN(now, 1):
		return errNodeRate
	}
	l.active[source]++
	return nil
}

func (l *upstreamLimit) end(source netip.Addr) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.active[source]--; l.active[source] <= 0 {
		delete(l.active, source)
	}
}
