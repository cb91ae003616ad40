// Package imdstap records every request that reaches a metadata service: it stands at the service's address and passes
// each request on as it came.
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
	URI       string // as it stood in the request line
	UserAgent string
	Status    int // of the service's answer
}

// escape is percent-encoding; what is no valid one stays as it is.
var escape = regexp.MustCompile(`%[0-9A-Fa-f]{2}`)

// AsksForCredentials tells whether the request could have yielded credentials, however its path is spelt: better one too
// many than one too few.
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

// Tap stands before a metadata service.
type Tap struct {
	endpoint *endpoint.Endpoint
	proxy    *httputil.ReverseProxy

	// one lets the requests through one at a time: Amazon's mock keeps its tokens in a map without a lock.
	one sync.Mutex

	mu       sync.Mutex
	requests []*Request
	missing  string // the prefix of paths that are answered with 404; empty for none
}

// Options of a Tap.
type Options struct {
	Address string          // host:port of the metadata service for its clients
	Listen  endpoint.Listen // net.Listen where nil
	// Backend is host:port of the service itself, Dial how to reach it; net.Dial where nil.
	Backend string
	// Listed is added to the listing of /latest/meta-data/, for a name that real instances list and a mock does not.
	Listed string
	Dial   func(network, address string) (net.Conn, error)
}

// Start passes requests on until Close.
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

// Addr is where the tap listens, host:port.
func (t *Tap) Addr() string { return t.endpoint.Addr() }

// Down makes the metadata service refuse connections until Up.
func (t *Tap) Down() { t.endpoint.Down() }

// Up serves again at the same address.
func (t *Tap) Up() error { return t.endpoint.Up() }

// Close stops the tap for good.
func (t *Tap) Close() { t.endpoint.Down() }

// SetMissing answers requests for paths with the prefix with 404 and the page of real instances. An empty prefix ends that.
func (t *Tap) SetMissing(prefix string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.missing = prefix
}

// notFound is the page that EC2 answers for a path that is not there.
const notFound = `<?xml version="1.0" encoding="iso-8859-1"?>
<html xmlns="http://www.w3.org/1999/xhtml"><head><title>404 - Not Found</title></head><body><h1>404 - Not Found</h1></body></html>
`

// ServeHTTP records a request before it passes it on, so that one without an answer is on record as well.
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

// Requests are the requests so far, in the order of their arrival.
func (t *Tap) Requests() []Request {
	t.mu.Lock()
	defer t.mu.Unlock()
	var all []Request
	for _, r := range t.requests {
		all = append(all, *r)
	}
	return all
}

// CredentialRequests are those of the requests so far that asked for credentials.
func (t *Tap) CredentialRequests() []Request {
	return slices.DeleteFunc(t.Requests(), func(r Request) bool { return !r.AsksForCredentials() })
}

// Reset forgets the requests so far.
func (t *Tap) Reset() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.requests = nil
}

// statusWriter notes the answer's status.
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
