// Package sts is a fake of AWS STS: AssumeRole and GetCallerIdentity of the Query API (version
// 2011-06-15) over a real socket.
//
// It verifies each request's Signature Version 4, enforces the API's limits on parameters,
// evaluates the roles' trust policies, and accepts the temporary credentials that it issued. Its
// errors have AWS's codes, statuses and XML.
package sts

import (
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/test/endpoint"
)

// Options of a Server. The zero value serves plain HTTP on a free port of the loopback interface.
type Options struct {
	Address string           // host:port
	Listen  endpoint.Listen  // nil is net.Listen
	Now     func() time.Time // nil is time.Now
}

// Server is STS with the principals and roles of an account. It is safe for concurrent use.
type Server struct {
	endpoint *endpoint.Endpoint
	now      func() time.Time

	mu         sync.Mutex
	principals map[string]Principal // by access key ID
	roles      map[string]Role      // by ARN
	fault      Fault
	calls      []*Call
}

// Start serves until Close. The server has no principals yet.
func Start(o Options) (*Server, error) {
	s := &Server{now: o.Now, principals: map[string]Principal{}, roles: map[string]Role{}}
	if s.now == nil {
		s.now = time.Now
	}
	if o.Address == "" {
		o.Address = "127.0.0.1:0"
	}
	var err error
	if s.endpoint, err = endpoint.Serve(o.Listen, o.Address, s, nil); err != nil {
		return nil, fmt.Errorf("stand-in STS: %w", err)
	}
	return s, nil
}

// URL returns the endpoint, as --sts-endpoint takes it.
func (s *Server) URL() string { return s.endpoint.URL() }

// Close cuts every connection and stops the server.
func (s *Server) Close() { s.endpoint.Down() }

// PutPrincipal adds a principal by its access key.
func (s *Server) PutPrincipal(p Principal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.principals[p.AccessKeyID] = p
}

// Expire ends the validity of the principal's credentials.
func (s *Server) Expire(accessKeyID string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.principals[accessKeyID]
	p.Expires = time.Unix(1, 0)
	s.principals[accessKeyID] = p
}

// PutRole creates or replaces a role by its ARN.
func (s *Server) PutRole(r Role) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.roles[r.ARN] = r
}

// DeleteRole removes a role. Its sessions stay valid.
func (s *Server) DeleteRole(arn string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.roles, arn)
}

// Call is one request that reached the server, even if it was refused.
type Call struct {
	Time   time.Time
	Action string
	// Caller is the ARN of the principal that signed the request, or empty if the signature is
	// invalid.
	Caller, AccessKeyID string
	// Region is that of the signature's credential scope.
	Region string

	RoleARN, SessionName, ExternalID, SourceIdentity, Policy string
	Duration                                                 time.Duration
	Tags                                                     map[string]string

	// Code is the error's code, empty for a success.
	Code string
	// Issued is the access key ID that AssumeRole returned.
	Issued string
}

// Calls returns the requests so far, in the order of their arrival.
func (s *Server) Calls() []Call {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []Call
	for _, c := range s.calls {
		all = append(all, *c)
	}
	return all
}

// ResetCalls removes the calls so far.
func (s *Server) ResetCalls() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls = nil
}

// maxBody is larger than any request within AssumeRole's limits.
const maxBody = 128 << 10

// ServeHTTP answers one request of the Query API.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if err != nil {
		return // the connection has failed
	}
	call := s.begin()
	id := newRequestID()
	result, apiErr := s.answer(r, body, call)
	if apiErr != nil {
		s.change(call, func(c *Call) { c.Code = apiErr.Code })
		writeXML(w, apiErr.status, id, errorResponse{Error: *apiErr, RequestID: id})
		return
	}
	writeXML(w, http.StatusOK, id, result(id))
}

// begin records a call. Its fields are set under the server's lock as the request is parsed.
func (s *Server) begin() *Call {
	s.mu.Lock()
	defer s.mu.Unlock()
	call := &Call{Time: s.now()}
	s.calls = append(s.calls, call)
	return call
}

func (s *Server) change(call *Call, set func(*Call)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	set(call)
}

// answer returns the result, as a function of the request's ID, or an error.
func (s *Server) answer(r *http.Request, body []byte, call *Call) (func(id string) any, *apiError) {
	params, apiErr := parametersOf(r, body)
	if apiErr != nil {
		return nil, apiErr
	}
	s.change(call, func(c *Call) { c.Action = params.Get("Action") })
	if apiErr := s.spoil(r); apiErr != nil {
		return nil, apiErr
	}
	caller, region, apiErr := s.authenticate(r, body)
	if apiErr != nil {
		return nil, apiErr
	}
	s.change(call, func(c *Call) { c.Caller, c.AccessKeyID, c.Region = caller.ARN, caller.AccessKeyID, region })
	if v := params.Get("Version"); v != "2011-06-15" {
		return nil, refuse(http.StatusBadRequest, "InvalidAction", "Could not find operation %s for version %s", params.Get("Action"), v)
	}
	switch action := params.Get("Action"); action {
	case "GetCallerIdentity":
		return func(id string) any { return callerIdentity(caller, id) }, nil
	case "AssumeRole":
		return s.assumeRole(caller, params, call)
	default:
		return nil, refuse(http.StatusBadRequest, "InvalidAction", "Could not find operation %s for version 2011-06-15", action)
	}
}

// parametersOf reads the parameters of the Query API: from the URL for GET, from a form for POST.
func parametersOf(r *http.Request, body []byte) (url.Values, *apiError) {
	if r.URL.Path != "/" {
		return nil, refuse(http.StatusNotFound, "UnknownOperationException", "no such path: %s", r.URL.Path)
	}
	raw := r.URL.RawQuery
	switch r.Method {
	case http.MethodGet:
	case http.MethodPost:
		raw = string(body)
	default:
		return nil, refuse(http.StatusMethodNotAllowed, "MethodNotAllowed", "%s is not GET or POST", r.Method)
	}
	params, err := url.ParseQuery(raw)
	if err != nil {
		return nil, refuse(http.StatusBadRequest, "MalformedQueryString", "%v", err)
	}
	for _, name := range slices.Sorted(maps.Keys(params)) {
		if len(params[name]) > 1 {
			return nil, refuse(http.StatusBadRequest, "MalformedQueryString", "%s is given more than once", name)
		}
	}
	return params, nil
}
