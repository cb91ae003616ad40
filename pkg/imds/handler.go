// Package imds serves the protocol of the EC2 instance metadata service, versions 1 and 2, to the pods
// of this node. docs/protocol.md lists the statements that it implements.
// https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/configuring-instance-metadata-service.html
package imds

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/credentials"
)

// Caller is the pod that sends one request, as of the moment of the request. An error of its methods
// should implement Refusal; any other is answered with status 500.
type Caller interface {
	// Session returns the value that the pod's session tokens are bound to. It must not block.
	Session() string
	// Name returns the pod by the node's records, or the address. It is for the log.
	Name() string
	// Role returns the bare name and the ARN of the pod's role.
	Role(ctx context.Context) (name, arn string, err error)
	// Credentials returns the document of the pod's role, if the role's name is role.
	Credentials(ctx context.Context, role string) (*credentials.Document, error)
}

// Refusal is an error that determines its answer.
type Refusal interface {
	error
	// HTTPStatus returns the status of the answer.
	HTTPStatus() int
	// Document returns the code and the message of the document in the answer's body. If the code is
	// empty, the body is the error page of the status.
	Document() (code, message string)
	// Subject returns the refused pod, for the log.
	Subject() string
}

// Forwarder answers requests for metadata other than credentials. The requests have a canonical path
// and no session token. A Forwarder that returns an error has written nothing.
type Forwarder interface {
	Forward(w http.ResponseWriter, r *http.Request) error
}

// Handler is the metadata service. Its requests must arrive on connections of a Listener, and the
// server must use ConnContext.
type Handler struct {
	caller        func(source netip.Addr, now time.Time) Caller
	sessions      *Sessions
	upstream      Forwarder
	log           *slog.Logger
	refusals      *refusalLog
	deny          []*regexp.Regexp
	requireTokens bool
	refused       func(status int)
	delayed       func()
}

// Config holds the dependencies and settings of a Handler.
type Config struct {
	// Caller returns the pod that holds the source address now.
	Caller   func(source netip.Addr, now time.Time) Caller
	Sessions *Sessions
	Upstream Forwarder
	// Deny matches canonical paths that are answered with 404, in addition to those that could yield the
	// node's own credentials.
	Deny []*regexp.Regexp
	// RequireTokens refuses requests without a session token, so that only version 2 works.
	RequireTokens bool
	// Delayed is called for each request that waits because its source makes too many. It may be nil.
	Delayed func()
	// Refused is called with the status for each request that is refused. It may be nil.
	Refused func(status int)
	Log     *slog.Logger
}

// NewHandler returns a Handler.
func NewHandler(c Config) *Handler {
	if c.Delayed == nil {
		c.Delayed = func() {}
	}
	if c.Refused == nil {
		c.Refused = func(int) {}
	}
	return &Handler{
		caller: c.Caller, sessions: c.Sessions, upstream: c.Upstream, log: c.Log, refusals: newRefusalLog(c.Log),
		deny: c.Deny, requireTokens: c.RequireTokens, refused: c.Refused, delayed: c.Delayed,
	}
}

// Header names in net/http's canonical spelling, so that header maps can be used without conversion.
const (
	tokenHeader    = "X-Aws-Ec2-Metadata-Token"
	tokenTTLHeader = "X-Aws-Ec2-Metadata-Token-Ttl-Seconds"
)

// httpError is a refusal by the proxy itself. It is logged if it has a reason.
type httpError struct {
	status int
	reason error // may be nil
}

func (e *httpError) Error() string {
	if e.reason == nil {
		return http.StatusText(e.status)
	}
	return e.reason.Error()
}

func (e *httpError) Unwrap() error { return e.reason }

var (
	errNotFound  = &httpError{http.StatusNotFound, nil}
	errForbidden = &httpError{http.StatusForbidden, nil}
	errMethod    = &httpError{http.StatusMethodNotAllowed, nil}
	errTTL       = &httpError{http.StatusBadRequest, nil}
	errRequests  = &httpError{http.StatusServiceUnavailable, errTooManyRequests}
	errNoToken   = &httpError{http.StatusUnauthorized, errors.New("a request without a session token, where one is required")}
	errBadToken  = &httpError{http.StatusUnauthorized, errors.New("a session token that has ended, or was not made for the pod that holds the address now")}

	errDenied = errors.New("a path that is denied to pods")
)

// ServeHTTP implements http.Handler.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header()["Server"] = serverValue
	c, ok := connOf(r.Context())
	if !ok {
		h.log.Error("a request without a source address: the server does not use ConnContext")
		h.writeError(w, http.StatusInternalServerError)
		return
	}
	if drainBody(r) {
		c.requestRead()
	}
	admitted := h.admit(c)
	now := time.Now()
	caller := h.caller(c.source, now)
	err := error(errRequests)
	if admitted {
		err = h.serve(w, r, c, caller, now)
	}
	if err != nil {
		h.refuse(w, r, caller, err)
	}
}

// serve answers one request of the caller. If it returns an error, it has written nothing.
func (h *Handler) serve(w http.ResponseWriter, r *http.Request, c *conn, caller Caller, now time.Time) error {
	if r.Method != http.MethodGet && r.Method != http.MethodHead && r.Method != http.MethodPut {
		return methodNotAllowed(w, "GET, HEAD")
	}
	path, ok := canonical(r.URL.Path)
	if !ok {
		return errNotFound // 400 would end every SDK's retries
	}
	route, role := routeOf(path)
	switch {
	case route == tokenRoute:
		return h.serveToken(w, r, caller)
	case route == versionedTokenRoute:
		return errForbidden
	case r.Method == http.MethodPut:
		return methodNotAllowed(w, "GET, HEAD")
	}
	if tokens, ok := r.Header[tokenHeader]; ok {
		if len(tokens) != 1 || !h.sessions.valid(&c.verified, tokens[0], caller.Session(), now) {
			return errBadToken
		}
	} else if h.requireTokens {
		return errNoToken
	}
	switch route {
	case credentialsRoute:
		return serveCredentials(w, r, caller, role)
	case roleRoute:
		name, _, err := caller.Role(r.Context())
		if err != nil {
			return err
		}
		writeText(w, name)
		return nil
	case infoRoute:
		return serveInfo(w, r, caller)
	case iamRoute:
		if _, _, err := caller.Role(r.Context()); err != nil {
			return err
		}
		writeText(w, "info\nsecurity-credentials/")
		return nil
	case forwardRoute:
		return h.forward(w, r, caller, path)
	}
	return errNotFound
}

// forward lets the node's metadata service answer for a canonical path.
func (h *Handler) forward(w http.ResponseWriter, r *http.Request, caller Caller, path string) error {
	if h.isDenied(path) {
		h.refusals.log(sourceOf(r.Context()), caller.Name(), http.StatusNotFound, errDenied, "path", path)
		return errNotFound
	}
	r.URL.Path, r.URL.RawPath, r.URL.RawQuery = path, "", ""
	if isListing(path) {
		return h.forwardListing(w, r, caller)
	}
	return h.upstream.Forward(w, r)
}

// drainBody reads up to 4 KiB of a request's body, and reports whether that was all. Some SDKs send a
// form, and s3fs sends a chunked body after 100-continue. Unread bytes would end the connection.
func drainBody(r *http.Request) bool {
	if r.ContentLength == 0 {
		return true
	}
	_, err := io.CopyN(io.Discard, r.Body, 4<<10)
	return err == io.EOF
}

// isDenied reports whether the configuration denies a path, with or without the slash at its end.
func (h *Handler) isDenied(path string) bool {
	bare := strings.TrimSuffix(path, "/")
	return slices.ContainsFunc(h.deny, func(d *regexp.Regexp) bool { return d.MatchString(path) || d.MatchString(bare) })
}

const (
	minTTL = 1
	maxTTL = 21600
)

func (h *Handler) serveToken(w http.ResponseWriter, r *http.Request, caller Caller) error {
	if r.Method != http.MethodPut {
		return methodNotAllowed(w, http.MethodPut)
	}
	if _, ok := r.Header["X-Forwarded-For"]; ok {
		return errForbidden
	}
	// ParseUint accepts digits only, so neither "+60" nor "0x3c" is a TTL.
	ttl, err := strconv.ParseUint(r.Header.Get(tokenTTLHeader), 10, 16)
	if err != nil || ttl < minTTL || ttl > maxTTL {
		return errTTL
	}
	token := h.sessions.Token(caller.Session(), time.Now().Add(time.Duration(ttl)*time.Second))
	w.Header()[tokenTTLHeader] = []string{strconv.FormatUint(ttl, 10)}
	writeText(w, token)
	return nil
}

func methodNotAllowed(w http.ResponseWriter, allow string) error {
	w.Header()["Allow"] = []string{allow}
	return errMethod
}

// refuse writes, counts and logs the answer to a request that failed with err.
func (h *Handler) refuse(w http.ResponseWriter, r *http.Request, caller Caller, err error) {
	if r.Context().Err() != nil && errors.Is(err, r.Context().Err()) {
		writeError(w, http.StatusInternalServerError) // the client disconnected; not counted
		return
	}
	source := sourceOf(r.Context())
	if e, ok := errors.AsType[*httpError](err); ok {
		if e.reason != nil {
			h.refusals.log(source, caller.Name(), e.status, e)
		}
		h.writeError(w, e.status)
		return
	}
	refusal, ok := errors.AsType[Refusal](err)
	if !ok {
		h.refusals.log(source, caller.Name(), http.StatusInternalServerError, err)
		h.writeError(w, http.StatusInternalServerError)
		return
	}
	status := refusal.HTTPStatus()
	h.refusals.log(source, refusal.Subject(), status, err)
	code, message := refusal.Document()
	if code == "" {
		h.writeError(w, status)
		return
	}
	h.refused(status)
	writeFailure(w, status, code, message)
}

// writeError writes the error page and counts the refusal.
func (h *Handler) writeError(w http.ResponseWriter, status int) {
	h.refused(status)
	writeError(w, status)
}
