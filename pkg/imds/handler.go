// Package imds serves the protocol of the EC2 instance metadata service, versions 1 and 2, to the
// pods of this node. docs/protocol.md lists the statements that it implements.
// https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/configuring-instance-metadata-service.html
package imds

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/credentials"
)

// Caller is the pod that sends one request, as of the moment of the request. An error of its
// methods should be a *Refusal; any other is answered with status 500.
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

// Forwarder returns metadata other than credentials for the pod at source. The path is canonical.
type Forwarder interface {
	Forward(ctx context.Context, source netip.Addr, path string) (*Response, error)
}

// Config holds the dependencies and settings of a Handler.
type Config struct {
	// Caller returns the pod that holds the source address now.
	Caller   func(source netip.Addr, now time.Time) Caller
	Sessions *Sessions
	Upstream Forwarder
	// Deny matches canonical paths that are answered with 404, in addition to those that could
	// yield the node's own credentials.
	Deny []*regexp.Regexp
	// RequireTokens refuses requests without a session token, so that only version 2 works.
	RequireTokens bool
	// Delayed is called for each request that waits because its source makes too many.
	Delayed func()
	// Refused is called with the status for each request that is refused.
	Refused func(status int)
	Log     *slog.Logger
}

// Handler is the metadata service. Its requests must arrive on connections of a Listener, and the
// server must use ConnContext.
type Handler struct {
	Config
	refusals refusalLog
}

// NewHandler returns a Handler.
func NewHandler(c Config) *Handler {
	return &Handler{Config: c, refusals: newRefusalLog()}
}

// Header names in net/http's canonical spelling, so that header maps can be used without
// conversion.
const (
	tokenHeader    = "X-Aws-Ec2-Metadata-Token"
	tokenTTLHeader = "X-Aws-Ec2-Metadata-Token-Ttl-Seconds"
)

// ServeHTTP implements http.Handler.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header()["Server"] = serverValue
	c, ok := r.Context().Value(connKey{}).(*conn)
	if !ok {
		h.Log.Error("a request without a source address: the server does not use ConnContext")
		writeError(w, http.StatusInternalServerError)
		return
	}
	c.isBusy.Store(true)
	defer c.isBusy.Store(false)
	c.finishRead(r)
	admitted := h.admit(c)
	now := time.Now()
	caller := h.Caller(c.source, now)
	err := error(errRequests)
	if admitted {
		err = h.serve(w, r, c, caller, now)
	}
	if err != nil {
		h.refuse(w, r, c.source, caller, err)
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
		return h.serveToken(w, r, caller, now)
	case route == versionedTokenRoute:
		return errForbidden
	case r.Method == http.MethodPut:
		return methodNotAllowed(w, "GET, HEAD")
	}
	if tokens, ok := r.Header[tokenHeader]; ok {
		if len(tokens) != 1 || !h.Sessions.valid(&c.verified, tokens[0], caller.Session(), now) {
			return errBadToken
		}
	} else if h.RequireTokens {
		return errNoToken
	}
	switch route {
	case notFoundRoute:
		return errNotFound
	case forwardRoute:
		return h.forward(w, r, c.source, caller, path)
	case credentialsRoute:
		return serveCredentials(w, r, caller, role)
	}
	name, arn, err := caller.Role(r.Context())
	if err != nil {
		return err
	}
	switch route {
	case iamRoute:
		writeText(w, "info\nsecurity-credentials/")
	case infoRoute:
		writeText(w, infoDocument(name, arn, now))
	case roleRoute:
		writeText(w, name)
	}
	return nil
}

// forward writes what the node's metadata service has at a canonical path.
func (h *Handler) forward(w http.ResponseWriter, r *http.Request, source netip.Addr, caller Caller, path string) error {
	if h.isDenied(path) {
		return &Refusal{Status: http.StatusNotFound, Err: fmt.Errorf("the path %s is denied to pods", path)}
	}
	res, err := h.Upstream.Forward(r.Context(), source, path)
	if err != nil {
		return err
	}
	body := res.body
	if isListing(path) {
		body = h.filterListing(r.Context(), caller, path, body)
	}
	writeSuccess(w, res.contentType, res.lastModified, body)
	return nil
}

// isDenied reports whether the configuration denies a path, with or without the slash at its end.
func (h *Handler) isDenied(path string) bool {
	bare := strings.TrimSuffix(path, "/")
	return slices.ContainsFunc(h.Deny, func(d *regexp.Regexp) bool { return d.MatchString(path) || d.MatchString(bare) })
}

func methodNotAllowed(w http.ResponseWriter, allow string) error {
	w.Header()["Allow"] = []string{allow}
	return errMethod
}
