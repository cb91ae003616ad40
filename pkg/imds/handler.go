// Package imds speaks the protocol of the EC2 instance metadata service, versions 1 and 2, to the pods of this node.
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

// Caller is the pod that sends one request, as of the moment the request came. An error of its methods should have the
// methods of Refusal; any other is a 500.
type Caller interface {
	// Session is what the session tokens of the pod are bound to. It must answer at once.
	Session() string
	// Name is who it is, for the log: the pod by the node's own records, or the address.
	Name() string
	// Role is the bare name and the ARN of the pod's role.
	Role(ctx context.Context) (name, arn string, err error)
	// Credentials is the document of the pod's role, if its name is role.
	Credentials(ctx context.Context, role string) (*credentials.Document, error)
}

// Refusal is an error that says how the metadata service words it.
type Refusal interface {
	error
	// HTTPStatus is the status of the answer.
	HTTPStatus() int
	// Document is the code and the message of the document that is the answer's body. Without a code the body is the error page
	// of the status.
	Document() (code, message string)
	// Subject is who was refused, for the log.
	Subject() string
}

// Forwarder answers what is not about credentials. Its requests have a canonical path and no session token. After an error nothing
// has been written.
type Forwarder interface {
	Forward(w http.ResponseWriter, r *http.Request) error
}

// Handler is the metadata service. Its requests must come over connections of a Listener, by way of ConnContext.
type Handler struct {
	caller   func(source netip.Addr, now time.Time) Caller
	sessions *Sessions
	upstream Forwarder
	log      *slog.Logger
	refusals *refusalLog
	deny     []*regexp.Regexp
	tokens   bool // are required
	refused  func(status int)
	delayed  func()
}

// Config is what a Handler depends on.
type Config struct {
	// Caller is who holds the source address now.
	Caller   func(source netip.Addr, now time.Time) Caller
	Sessions *Sessions
	Upstream Forwarder
	// Deny are canonical paths that are not found, besides those that could yield the node's own credentials, which never are.
	Deny []*regexp.Regexp
	// RequireTokens has requests without a session token refused, which is version 2 alone.
	RequireTokens bool
	// Delayed is called for each request that waits because its source makes too many. It may be nil.
	Delayed func()
	// Refused is called for each request that is refused, with the status. It may be nil.
	Refused func(status int)
	Log     *slog.Logger
}

// NewHandler is the service over its dependencies.
func NewHandler(c Config) *Handler {
	h := &Handler{caller: c.Caller, sessions: c.Sessions, upstream: c.Upstream, log: c.Log, refusals: newRefusalLog(c.Log),
		deny: c.Deny, tokens: c.RequireTokens, refused: c.Refused, delayed: c.Delayed}
	if h.delayed == nil {
		h.delayed = func() {}
	}
	if h.refused == nil {
		h.refused = func(int) {}
	}
	return h
}

// Header names in net/http's canonical spelling, so that the maps can be used without a conversion.
const (
	tokenHeader    = "X-Aws-Ec2-Metadata-Token"
	tokenTTLHeader = "X-Aws-Ec2-Metadata-Token-Ttl-Seconds"
)

// Values of headers that never change, shared so that an answer makes none.
var (
	serverValue = []string{"EC2ws"} // some agents know EC2 by it
	plainText   = []string{"text/plain"}
	html        = []string{"text/html"}
	noRanges    = []string{"none"}
)

// ServeHTTP implements http.Handler.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header()["Server"] = serverValue
	c, ok := connOf(r.Context())
	if !ok {
		h.log.Error("a request without a source address: the server does not use ConnContext")
		h.fail(w, http.StatusInternalServerError)
		return
	}
	if drained(r) {
		c.read()
	}
	source := c.source
	if !h.admit(c) {
		h.refusals.log(source, h.caller(source, time.Now()).Name(), http.StatusServiceUnavailable, errRequests)
		h.fail(w, http.StatusServiceUnavailable)
		return
	}
	if r.Method != http.MethodGet && r.Method != http.MethodHead && r.Method != http.MethodPut {
		h.refuseMethod(w, "GET, HEAD")
		return
	}
	path, ok := canonical(r.URL.Path)
	if !ok { // no such path; 400 would end every SDK's tries
		h.fail(w, http.StatusNotFound)
		return
	}
	to, role := routeOf(path)
	now := time.Now()
	caller := h.caller(source, now)
	switch to {
	case token:
		h.serveToken(w, r, caller)
		return
	case tokenOfVersion:
		h.fail(w, http.StatusForbidden)
		return
	}
	if r.Method == http.MethodPut {
		h.refuseMethod(w, "GET, HEAD")
		return
	}
	if tokens, ok := r.Header[tokenHeader]; ok {
		if len(tokens) != 1 || !h.sessions.valid(&c.proof, tokens[0], caller.Session(), now) {
			h.refusals.log(source, caller.Name(), http.StatusUnauthorized, errBadToken)
			h.fail(w, http.StatusUnauthorized)
			return
		}
	} else if h.tokens {
		h.refusals.log(source, caller.Name(), http.StatusUnauthorized, errNoToken)
		h.fail(w, http.StatusUnauthorized)
		return
	}
	switch to {
	case roleDocument:
		h.serveDocument(w, r, source, caller, role)
	case roleList:
		h.serveRole(w, r, source, caller)
	case iamInfo:
		h.serveInfo(w, r, source, caller)
	case iamListing:
		if _, _, err := caller.Role(r.Context()); err != nil {
			h.refuse(w, r, source, caller, err)
			return
		}
		answer(w, "info\nsecurity-credentials/")
	case forward:
		if h.denied(path) {
			h.refusals.log(source, caller.Name(), http.StatusNotFound, errDenied, "path", path)
			h.fail(w, http.StatusNotFound)
			return
		}
		r.URL.Path, r.URL.RawPath, r.URL.RawQuery = path, "", ""
		var err error
		if isListing(path) {
			err = h.forwardListing(w, r, caller)
		} else {
			err = h.upstream.Forward(w, r)
		}
		if err != nil {
			h.refuse(w, r, source, caller, err)
		}
	default:
		h.fail(w, http.StatusNotFound)
	}
}

var (
	errNoToken  = errors.New("a request without a session token, where one is required")
	errDenied   = errors.New("a path that is denied to pods")
	errBadToken = errors.New("a session token that has ended, or was not made for the pod that holds the address now")
)

// drained reads a little of a request's body, and tells whether that was all. Some SDKs send a form, s3fs a chunked body after
// 100-continue: the connection lives on.
func drained(r *http.Request) bool {
	if r.ContentLength == 0 {
		return true
	}
	_, err := io.CopyN(io.Discard, r.Body, 4<<10)
	return err == io.EOF
}

// denied tells whether a path is one of those that pods must not see, with and without the slash at its end.
func (h *Handler) denied(path string) bool {
	bare := strings.TrimSuffix(path, "/")
	return slices.ContainsFunc(h.deny, func(d *regexp.Regexp) bool { return d.MatchString(path) || d.MatchString(bare) })
}

// fail writes the error page and counts the refusal.
func (h *Handler) fail(w http.ResponseWriter, status int) {
	h.refused(status)
	fail(w, status)
}

const (
	minTTL = 1
	maxTTL = 21600
)

func (h *Handler) serveToken(w http.ResponseWriter, r *http.Request, caller Caller) {
	if r.Method != http.MethodPut {
		h.refuseMethod(w, http.MethodPut)
		return
	}
	if _, ok := r.Header["X-Forwarded-For"]; ok {
		h.fail(w, http.StatusForbidden)
		return
	}
	// ParseUint takes digits only, so neither "+60" nor "0x3c" is a TTL.
	ttl, err := strconv.ParseUint(r.Header.Get(tokenTTLHeader), 10, 16)
	if err != nil || ttl < minTTL || ttl > maxTTL {
		h.fail(w, http.StatusBadRequest)
		return
	}
	token := h.sessions.Token(caller.Session(), time.Now().Add(time.Duration(ttl)*time.Second))
	w.Header()[tokenTTLHeader] = []string{strconv.FormatUint(ttl, 10)}
	answer(w, token)
}

func (h *Handler) refuseMethod(w http.ResponseWriter, allow string) {
	w.Header()["Allow"] = []string{allow}
	h.fail(w, http.StatusMethodNotAllowed)
}

func (h *Handler) serveDocument(w http.ResponseWriter, r *http.Request, source netip.Addr, caller Caller, role string) {
	doc, err := caller.Credentials(r.Context(), role)
	if err != nil {
		h.refuse(w, r, source, caller, err)
		return
	}
	header := w.Header()
	header["Content-Type"] = plainText
	header["Accept-Ranges"] = noRanges
	header["Content-Length"] = doc.ContentLength()
	header["Last-Modified"] = doc.LastModified()
	w.Write(doc.Body())
}

func (h *Handler) serveRole(w http.ResponseWriter, r *http.Request, source netip.Addr, caller Caller) {
	name, _, err := caller.Role(r.Context())
	if err != nil {
		h.refuse(w, r, source, caller, err)
		return
	}
	answer(w, name)
}

// answer is a success of a few bytes, without a newline at its end: several SDKs take the body as it is.
func answer(w http.ResponseWriter, body string) {
	header := w.Header()
	header["Content-Type"] = plainText
	header["Accept-Ranges"] = noRanges
	header["Content-Length"] = []string{strconv.Itoa(len(body))}
	header["Last-Modified"] = []string{time.Now().UTC().Format(http.TimeFormat)}
	io.WriteString(w, body)
}

func (h *Handler) refuse(w http.ResponseWriter, r *http.Request, source netip.Addr, caller Caller, err error) {
	if r.Context().Err() != nil && errors.Is(err, r.Context().Err()) {
		fail(w, http.StatusInternalServerError) // the client left; nobody reads this
		return
	}
	if f, ok := errors.AsType[*forwardError](err); ok {
		if f.status != http.StatusNotFound { // that the instance has no such thing needs no explanation
			h.refusals.log(source, caller.Name(), f.status, f)
		}
		h.fail(w, f.status)
		return
	}
	refusal, ok := errors.AsType[Refusal](err)
	if !ok {
		h.refusals.log(source, caller.Name(), http.StatusInternalServerError, err)
		h.fail(w, http.StatusInternalServerError)
		return
	}
	status := refusal.HTTPStatus()
	h.refusals.log(source, refusal.Subject(), status, err)
	code, message := refusal.Document()
	if code == "" {
		h.fail(w, status)
		return
	}
	h.refused(status)
	body := failureDocument(code, message, time.Now())
	header := w.Header()
	header["Content-Type"] = plainText
	header["Content-Length"] = []string{strconv.Itoa(len(body))}
	w.WriteHeader(status)
	io.WriteString(w, body)
}
