package imds

import (
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// shares bounds how many of something that all pods share are held by each, told apart by the address that it comes from.
type shares struct {
	most int

	mu   sync.Mutex
	held map[netip.Addr]int
}

func newShares(most int) *shares { return &shares{most: most, held: make(map[netip.Addr]int)} }

// take is false where the source holds as many as it may.
func (s *shares) take(source netip.Addr) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held[source] >= s.most {
		return false
	}
	s.held[source]++
	return true
}

func (s *shares) give(source netip.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held[source]--; s.held[source] <= 0 {
		delete(s.held, source)
	}
}

// paces bounds how often each source may do something.
type paces struct {
	every rate.Limit
	burst int

	mu      sync.Mutex
	sources map[netip.Addr]*rate.Limiter
}

// maxPaces is how many sources are remembered; then those are forgotten that have rested long enough to begin anew.
const maxPaces = 1024

func newPaces(every rate.Limit, burst int) *paces {
	return &paces{every: every, burst: burst, sources: make(map[netip.Addr]*rate.Limiter)}
}

func (p *paces) allow(source netip.Addr, now time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	l := p.sources[source]
	if l == nil {
		if len(p.sources) >= maxPaces {
			p.forget(now)
		}
		l = rate.NewLimiter(p.every, p.burst)
		p.sources[source] = l
	}
	return l.AllowN(now, 1)
}

// forget is for a node of which more addresses have come than it has pods. Where none has rested all are forgotten: to remember
// without bound would cost more than a burst.
func (p *paces) forget(now time.Time) {
	for source, l := range p.sources {
		if l.TokensAt(now) >= float64(p.burst) {
			delete(p.sources, source)
		}
	}
	if len(p.sources) >= maxPaces {
		clear(p.sources)
	}
}
