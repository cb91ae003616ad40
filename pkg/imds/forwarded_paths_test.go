package imds

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/time/rate"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/ratelimit"
)

// backend is the node's metadata service behind the real Upstream; it writes down each request that reaches it.
type backend struct {
	mu   sync.Mutex
	seen []*http.Request
}

func (b *backend) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method == http.MethodPut && r.URL.Path == "/latest/api/token" {
		io.WriteString(w, "token")
		return
	}
	body, _ := io.ReadAll(io.LimitReader(r.Body, 1))
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(body) > 0 {
		r.ContentLength = -2 // it had a body
	}
	b.seen = append(b.seen, r)
	io.WriteString(w, "other metadata")
}

func (b *backend) take() []*http.Request {
	b.mu.Lock()
	defer b.mu.Unlock()
	seen := b.seen
	b.seen = nil
	return seen
}

// decodings are all that a path may read as when its escapes are resolved again and again.
func decodings(path string) []string {
	all := []string{path}
	for range 8 {
		next := decodeOnce(path)
		if next == path {
			break
		}
		path = next
		all = append(all, path)
	}
	return all
}

// decodeOnce resolves what is a valid escape and leaves the rest, as lenient readers do.
func decodeOnce(s string) string {
	const hex = "0123456789abcdef"
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '%' && i+2 < len(s) {
			high, low := strings.IndexByte(hex, lower(s[i+1])), strings.IndexByte(hex, lower(s[i+2]))
			if high >= 0 && low >= 0 {
				b.WriteByte(byte(high<<4 | low))
				i += 2
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

func lower(c byte) byte { return strings.ToLower(string(rune(c)))[0] }

// FuzzRawRequestsNeverReachCredentials sends whatever bytes a pod may send over a connection: encodings, dot segments,
// parameters, absolute-form and authority-form targets, CONNECT, and requests inside of others' bodies. The real server
// reads them, and of what the node's service is then asked, nothing could yield credentials, and nothing has a body in which
// it could be hidden.
func FuzzRawRequestsNeverReachCredentials(f *testing.F) {
	const to = " HTTP/1.1\r\nHost: 169.254.169.254\r\n"
	const role = "/latest/meta-data/iam/security-credentials/node"
	for _, seed := range []string{
		"GET /latest/meta-data/instance-id" + to + "\r\n",
		"GET " + role + to + "\r\n",
		"GET http://169.254.169.254" + role + to + "\r\n",
		"GET http://169.254.169.254/latest/meta-data/instance-id" + to + "\r\n",
		"GET http://x/y@169.254.169.254" + role + to + "\r\n",
		"GET //169.254.169.254" + role + to + "\r\n",
		"CONNECT 169.254.169.254:80" + to + "\r\nGET " + role + to + "\r\n",
		"CONNECT " + role + to + "\r\n",
		"OPTIONS *" + to + "\r\n",
		"GET *" + to + "\r\n",
		"GET 169.254.169.254:80" + to + "\r\n",
		"GET /latest/meta-data/iam%2Fsecurity-credentials%2Fnode" + to + "\r\n",
		"GET /latest/meta-data/%2569am/security-credentials/node" + to + "\r\n",
		"GET /latest/meta-data/x/../iam/./security-credentials//node" + to + "\r\n",
		"GET /latest/meta-data;a=b/iam;c/security-credentials;d/node" + to + "\r\n",
		"GET /latest/meta-data/IAM/Security-Credentials/node" + to + "\r\n",
		"GET /latest/meta-data/instance-id?x=" + role + to + "\r\n",
		"GET /latest/meta-data/instance-id#" + role + to + "\r\n",
		"GET /latest/meta-data/instance-id" + to + "Content-Length: 60\r\n\r\nGET " + role + to + "\r\n",
		"GET /latest/meta-data/instance-id" + to + "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\nGET " + role + to + "\r\n",
		"POST /latest/meta-data/instance-id" + to + "Transfer-Encoding: chunked\r\n\r\n5\r\nGET /\r\n0\r\n\r\n",
		"GET /latest/meta-data/instance-id" + to + "Transfer-Encoding: \x0bchunked\r\n\r\n",
		"GET /latest/meta-data/instance-id" + to + "Connection: X-aws-ec2-metadata-token\r\nUpgrade: h2c\r\n\r\n",
		"GET /latest/meta-data/instance-id\tHTTP/1.1\r\nHost: x\r\n\r\n",
		"GET /latest/meta-data/instance-id HTTP/1.1\nHost: x\nX: y\n\nGET " + role + " HTTP/1.1\nHost: x\n\n",
		"GET /latest/meta-data/\r\n HTTP/1.1\r\nHost: x\r\n\r\n",
		"GET /latest/meta-data/instance-id" + to + "X-Original-URL: " + role + "\r\nX-Rewrite-URL: " + role + "\r\nX-HTTP-Method-Override: PUT\r\n\r\n",
		"HEAD " + role + to + "\r\nGET /latest/meta-data/instance-id" + to + "\r\n",
		"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
		"GET /%E2%80%A6/latest/meta-data/\u0131am/info" + to + "\r\n",
	} {
		f.Add([]byte(seed))
	}
	node := new(backend)
	metadata := httptest.NewServer(node)
	defer metadata.Close()
	log := slog.New(slog.DiscardHandler)
	upstream, err := NewUpstream(strings.TrimPrefix(metadata.URL, "http://"))
	if err != nil {
		f.Fatal(err)
	}
	upstream.limit.pods = ratelimit.NewKeyed[netip.Addr](rate.Inf, 1) // each request is to be seen
	caller := &fakeCaller{session: "uid", role: "own", err: &Refusal{Status: http.StatusNotFound, Err: errTest}}
	h := newTestHandler(Config{
		Caller: func(netip.Addr, time.Time) Caller { return caller }, Sessions: NewSessions(NewKey()), Upstream: upstream, Log: log,
	})
	s := httptest.NewUnstartedServer(h)
	s.Config.ReadTimeout = 2 * time.Second
	s.Config.DisableGeneralOptionsHandler = true
	s.Config.ErrorLog = slog.NewLogLogger(log.Handler(), slog.LevelDebug)
	s.Config.ConnContext = func(ctx context.Context, c net.Conn) context.Context {
		return ConnContext(ctx, newTestConn(c.(*net.TCPConn), netip.MustParseAddr("10.0.0.1"), newRequestLimit(0)))
	}
	s.Start()
	defer s.Close()
	address := strings.TrimPrefix(s.URL, "http://")

	f.Fuzz(func(t *testing.T, raw []byte) {
		if len(raw) > 4<<10 {
			return
		}
		c, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(10 * time.Second))
		c.Write(raw)
		c.(*net.TCPConn).CloseWrite()
		io.Copy(io.Discard, c)
		for _, r := range node.take() {
			if r.Method != http.MethodGet && r.Method != http.MethodHead {
				t.Errorf("the node's service got %s %s of %q", r.Method, r.RequestURI, raw)
			}
			if r.ContentLength != 0 || len(r.TransferEncoding) > 0 || r.Header.Get("Upgrade") != "" {
				t.Errorf("the node's service got %s with a body or an upgrade, of %q", r.RequestURI, raw)
			}
			for name := range r.Header {
				if strings.Contains(strings.ToLower(name), "url") || strings.Contains(strings.ToLower(name), "override") {
					t.Errorf("the node's service got the header %s of %q", name, raw)
				}
			}
			for _, path := range decodings(r.RequestURI) {
				path = strings.ToLower(path)
				segments := strings.FieldsFunc(path, func(c rune) bool { return c == '/' || c == ';' || c == '\\' })
				names := func(segment string) bool {
					return segment == "iam" || segment == ".." || strings.HasPrefix(segment, "security-credentials") || strings.HasPrefix(segment, "identity-credentials")
				}
				if slices.ContainsFunc(segments, names) {
					t.Errorf("the node's service got %s of %q", r.RequestURI, raw)
				}
			}
		}
	})
}
