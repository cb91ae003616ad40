package imds

import (
	"net/netip"
	"sync"
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
