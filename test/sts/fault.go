package sts

import (
	"net/http"
	"time"
)

// Fault disturbs the answers to requests that arrive while it is set. The zero Fault is none.
type Fault struct {
	// Latency delays each answer.
	Latency time.Duration
	// Status and Code, if set, are the error of each answer.
	Status  int
	Code    string
	Message string
}

// The faults that AWS's own clients handle specially.
var (
	Throttled   = Fault{Status: http.StatusBadRequest, Code: "Throttling", Message: "Rate exceeded"}
	Unavailable = Fault{Status: http.StatusServiceUnavailable, Code: "ServiceUnavailable", Message: "Service is unable to handle request."}
	Internal    = Fault{Status: http.StatusInternalServerError, Code: "InternalFailure", Message: "The request processing has failed because of an unknown error, exception or failure."}
	// Expired is the answer to callers whose own credentials have expired.
	Expired = Fault{Status: http.StatusForbidden, Code: "ExpiredToken", Message: "The security token included in the request is expired"}
	// RegionDisabled is the answer of a regional endpoint that the account has not activated.
	RegionDisabled = Fault{Status: http.StatusForbidden, Code: "RegionDisabledException", Message: "STS is not activated in this region for this account."}
)

// SetFault replaces the fault.
func (s *Server) SetFault(f Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fault = f
}

// Down cuts all connections and refuses new ones until Up.
func (s *Server) Down() { s.endpoint.Down() }

// Up serves again at the same address.
func (s *Server) Up() error { return s.endpoint.Up() }

// spoil waits for the latency, or until the client disconnects, and returns the fault's error or
// nil.
func (s *Server) spoil(r *http.Request) *apiError {
	s.mu.Lock()
	f := s.fault
	s.mu.Unlock()
	if f.Latency > 0 {
		select {
		case <-time.After(f.Latency):
		case <-r.Context().Done():
		}
	}
	if f.Code == "" {
		return nil
	}
	return refuse(f.Status, f.Code, "%s", f.Message)
}
