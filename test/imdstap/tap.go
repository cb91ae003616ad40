// Package imdstap is a reverse proxy in front of a metadata service that records every request.
package imdstap

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/kube2iam-cni/kube2iam-cni/test/endpoint"
)

// Request is a request as it arrived.
type Request struct {
	Source    netip.Addr
	Method    string
	URI       string // as in the request line
	UserAgent string
	Status    int // of the response
}

// escape matches percent-encoding. Invalid encodings stay as they are.
var escape = regexp.MustCompile(`%[0-9A-Fa-f]{2}`)

// AsksForCredentials reports whether the request could have yielded credentials, however its path
// is spelt. It errs towards true.
func (r Request) AsksForCredentials() bool {
	path := r.URI
	for escape.MatchString(path) {
		path = escape.ReplaceAllStringFunc(path, func(e string) string {
			b, _ := hex.DecodeString(e[1:])
			return string(b)
		})
	}
	path = strings.ToLower(path)
	return strings.Contains(path, "security-credentials") || strings.Contains(path, "identity-credentials")
}

// Tap is the reverse proxy.
type Tap struct {
	endpoint *endpoint.Endpoint
	proxy    *httputil.ReverseProxy

	// one serializes requests: Amazon's mock has its tokens in a map without a lock.
	one sync.Mutex

	mu       sync.Mutex
	requests []*Request
	missing  string // prefix of paths that are answered with 404; empty for none
}

// Options of a Tap.
type Options struct {
	Address string          // host:port at which clients find the service
	Listen  endpoint.Listen // nil is net.Listen
	// Backend is host:port of the service itself, and Dial connects to it. A nil Dial is net.Dial.
	Backend string
	// Listed is added to the listing of /latest/meta-data/: a name that instances list and the mock
	// does not.
	Listed string
	Dial   func(network, address string) (net.Conn, error)
}

// Start forwards requests until Close.
func Start(o Options) (*Tap, error) {
	if o.Dial == nil {
		o.Dial = net.Dial
	}
	t := &Tap{}
	t.proxy = &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL.Scheme, r.Out.URL.Host = "http", o.Backend
			r.Out.Host = r.In.Host
		},
		Transport: &http.Transport{Dial: o.Dial, DisableCompression: true},
		ModifyResponse: func(res *http.Response) error {
			if o.Listed == "" || res.StatusCode != http.StatusOK || strings.TrimSuffix(res.Request.URL.Path, "/") != "/latest/meta-data" {
				return nil
			}
			return list(res, o.Listed)
		},
	}
	var err error
	if t.endpoint, err = endpoint.Serve(o.Listen, o.Address, t, nil); err != nil {
		return nil, fmt.Errorf("tap on the metadata service: %w", err)
	}
	return t, nil
}

// list adds a name to a listing.
func list(res *http.Response, name string) error {
	body, err := io.ReadAll(res.Body)
	if err != nil {
		return err
	}
	body = append(bytes.TrimSuffix(body, []byte("\n")), "\n"+name...)
	res.Body, res.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
	res.Header.Set("Content-Length", strconv.Itoa(len(body)))
	return nil
}

// Addr returns the address at which the tap listens, host:port.
func (t *Tap) Addr() string { return t.endpoint.Addr() }

// Down makes the metadata service refuse connections until Up.
func (t *Tap) Down() { t.endpoint.Down() }

// Up serves again at the same address.
func (t *Tap) Up() error { return t.endpoint.Up() }

// Close stops the tap.
func (t *Tap) Close() { t.endpoint.Down() }

// SetMissing answers requests for paths with the prefix with 404 and the page of a real instance.
// An empty prefix ends it.
func (t *Tap) SetMissing(prefix string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.missing = prefix
}

// notFound is EC2's page for a path that does not exist.
const notFound = `<?xml version="1.0" encoding="iso-8859-1"?>
<html xmlns="http://www.w3.org/1999/xhtml"><head><title>404 - Not Found</title></head><body><h1>404 - Not Found</h1></body></html>
`

// ServeHTTP records a request before it forwards it: a request without an answer is recorded too.
func (t *Tap) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	source, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		panic(fmt.Sprintf("the remote address of a TCP connection is %q: %v", r.RemoteAddr, err))
	}
	request := &Request{Source: source.Addr().Unmap(), Method: r.Method, URI: r.RequestURI, UserAgent: r.UserAgent()}
	t.mu.Lock()
	t.requests = append(t.requests, request)
	missing := t.missing != "" && strings.HasPrefix(r.URL.Path, t.missing)
	t.mu.Unlock()
	w = &statusWriter{w, t, request}
	if missing {
		w.Header().Set("Content-Type", "text/html")
		w.WriteHeader(http.StatusNotFound)
		io.WriteString(w, notFound)
		return
	}
	t.one.Lock()
	defer t.one.Unlock()
	t.proxy.ServeHTTP(w, r)
}

// Requests returns the requests so far, in the order of their arrival.
func (t *Tap) Requests() []Request {
	t.mu.Lock()
	defer t.mu.Unlock()
	var all []Request
	for _, r := range t.requests {
		all = append(all, *r)
	}
	return all
}

// CredentialRequests returns the requests so far that asked for credentials.
func (t *Tap) CredentialRequests() []Request {
	return slices.DeleteFunc(t.Requests(), func(r Request) bool { return !r.AsksForCredentials() })
}

// Reset removes the requests so far.
func (t *Tap) Reset() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.requests = nil
}

// statusWriter records the status of the response.
type statusWriter struct {
	http.ResponseWriter
	tap     *Tap
	request *Request
}

func (w *statusWriter) WriteHeader(status int) {
	w.tap.mu.Lock()
	w.request.Status = status
	w.tap.mu.Unlock()
	w.ResponseWriter.WriteHeader(status)
}
