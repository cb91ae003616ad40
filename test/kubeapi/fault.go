package kubeapi

import (
	"net/http"
	"time"
)

// Fault spoils the answers to requests that arrive while it is set. Watches that are open by then go on.
type Fault struct {
	// Latency is how long each answer waits.
	Latency time.Duration
	// Status, where not zero, is the HTTP status that each request is refused with.
	Status int
}

// SetFault replaces the fault; the zero Fault is none.
func (s *Server) SetFault(f Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fault = f
}

// Down cuts all connections and refuses new ones until Up, while objects can still be changed.
func (s *Server) Down() { s.endpoint.Down() }

// Up serves again at the same address.
func (s *Server) Up() error { return s.endpoint.Up() }

// DropWatches breaks off every open watch in the middle of its stream.
func (s *Server) DropWatches() { s.dropWatches.fire() }

// SendBookmarks sends a bookmark to every open watch that allows it.
func (s *Server) SendBookmarks() { s.bookmark.fire() }

// Compact forgets all changes up to now, so that watches from earlier versions get 410 Gone and have to list again.
func (s *Server) Compact() { s.store.forget() }

// spoil waits out the fault's latency and tells the status to refuse with, or 0. The client that goes away ends the wait.
func (s *Server) spoil(r *http.Request) int {
	s.mu.Lock()
	f := s.fault
	s.mu.Unlock()
	if f.Latency > 0 {
		select {
		case <-time.After(f.Latency):
		case <-r.Context().Done():
		}
	}
	return f.Status
}
