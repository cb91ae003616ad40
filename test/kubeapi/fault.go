package kubeapi

import (
	"net/http"
	"time"
)

// Fault disturbs the answers to requests that arrive while it is set. Open watches continue.
type Fault struct {
	// Latency delays each answer.
	Latency time.Duration
	// Status, if not zero, is the HTTP status of each answer.
	Status int
}

// SetFault replaces the fault. The zero Fault is none.
func (s *Server) SetFault(f Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fault = f
}

// Down cuts all connections and refuses new ones until Up. Objects can still be changed.
func (s *Server) Down() { s.endpoint.Down() }

// Up serves again at the same address.
func (s *Server) Up() error { return s.endpoint.Up() }

// DropWatches breaks every open watch in the middle of its stream.
func (s *Server) DropWatches() { s.dropWatches.fire() }

// SendBookmarks sends a bookmark to every open watch that allows it.
func (s *Server) SendBookmarks() { s.bookmark.fire() }

// Compact removes the history of changes: watches from earlier versions get 410 Gone and must list
// again.
func (s *Server) Compact() { s.store.forget() }

// spoil waits for the fault's latency, or until the client disconnects, and returns the status of
// the refusal or 0.
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
