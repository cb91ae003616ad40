package imds

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/credentials"
)

var errTest = errors.New("refused because of the test")

// fakeCaller is one pod.
type fakeCaller struct {
	mu      sync.Mutex
	session string
	role    string
	doc     *credentials.Document
	err     error
}

func (b *fakeCaller) Name() string { return "ns/pod" }
func (b *fakeCaller) Session() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.session
}

func (b *fakeCaller) Role(context.Context) (string, string, error) {
	return b.role, "arn:aws:iam::123456789012:role/path/" + b.role, b.err
}

func (b *fakeCaller) Credentials(_ context.Context, role string) (*credentials.Document, error) {
	if b.err != nil {
		return nil, b.err
	}
	if role != b.role {
		return nil, &Refusal{Status: http.StatusNotFound, Err: errTest}
	}
	return b.doc, nil
}

// service is a metadata service on loopback, whose upstream writes down what reaches it.
type service struct {
	*httptest.Server
	log      *bytes.Buffer
	mu       sync.Mutex
	upstream []string
}

func serve(t *testing.T, b *fakeCaller, with ...func(*Config)) *service {
	t.Helper()
	s := &service{log: new(bytes.Buffer)}
	config := Config{
		Caller: func(netip.Addr, time.Time) Caller { return b }, Sessions: NewSessions(NewKey()), Log: slog.New(slog.NewTextHandler(s.log, nil)),
		Upstream: forwarder(func(path string) (*Response, error) {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.upstream = append(s.upstream, path)
			return &Response{contentType: plainText, body: "upstream"}, nil
		}),
	}
	for _, change := range with {
		change(&config)
	}
	s.Server = httptest.NewUnstartedServer(newTestHandler(config))
	s.Config.ConnContext = func(ctx context.Context, c net.Conn) context.Context {
		return ConnContext(ctx, newTestConn(c.(*net.TCPConn), netip.MustParseAddr("10.0.0.1"), newRequestLimit(0)))
	}
	s.Start()
	t.Cleanup(s.Close)
	return s
}

func document(t testing.TB) *credentials.Document {
	t.Helper()
	cache := credentials.New(oneCredentials{}, credentials.Config{Log: slog.New(slog.DiscardHandler), Observer: noObserver{}})
	go cache.Run(t.Context())
	d, err := cache.Get(t.Context(), "pod", assumption)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

type header map[string]string

// do makes one request and gives back its status, body and headers.
func (s *service) do(t *testing.T, method, path string, h header) (int, string, http.Header) {
	t.Helper()
	req, err := http.NewRequest(method, s.URL, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.URL.Opaque = path // as it is, without the client's own cleaning
	for k, v := range h {
		req.Header.Set(k, v)
	}
	res, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, string(body), res.Header
}

func (s *service) token(t *testing.T) string {
	t.Helper()
	status, body, _ := s.do(t, http.MethodPut, "/latest/api/token", header{tokenTTLHeader: "60"})
	if status != http.StatusOK {
		t.Fatalf("PUT token: %d %s", status, body)
	}
	return body
}

const (
	list = "/latest/meta-data/iam/security-credentials/"
	doc  = list + "reader"
)

func TestIMDS07TokenIsBareAndItsTTLEchoed(t *testing.T) {
	s := serve(t, &fakeCaller{session: "uid"})
	for _, ttl := range []string{"1", "60", "21600"} {
		status, body, h := s.do(t, http.MethodPut, "/latest/api/token", header{tokenTTLHeader: ttl})
		if status != http.StatusOK || body == "" || strings.TrimSpace(body) != body || h.Get(tokenTTLHeader) != ttl || h.Get("Content-Type") != "text/plain" {
			t.Errorf("TTL %s: %d %q %v", ttl, status, body, h)
		}
	}
}

func TestIMDS08BadTTLIs400(t *testing.T) {
	s := serve(t, &fakeCaller{session: "uid"})
	for _, ttl := range []string{"", "0", "21601", "-1", "+60", "1.5", "abc", "99999999999999999999", "60, 60"} {
		if status, body, _ := s.do(t, http.MethodPut, "/latest/api/token", header{tokenTTLHeader: ttl}); status != http.StatusBadRequest {
			t.Errorf("TTL %q: %d %q", ttl, status, body)
		}
	}
	if status, _, _ := s.do(t, http.MethodPut, "/latest/api/token", nil); status != http.StatusBadRequest {
		t.Errorf("no TTL: %d", status)
	}
}

func TestIMDS09ForwardedOrDatedTokenRequestsAre403(t *testing.T) {
	s := serve(t, &fakeCaller{session: "uid"})
	if status, _, _ := s.do(t, http.MethodPut, "/latest/api/token", header{tokenTTLHeader: "60", "X-Forwarded-For": "10.0.0.2"}); status != http.StatusForbidden {
		t.Errorf("X-Forwarded-For: %d", status)
	}
	if status, _, _ := s.do(t, http.MethodPut, "/2021-01-03/api/token", header{tokenTTLHeader: "60"}); status != http.StatusForbidden {
		t.Errorf("dated: %d", status)
	}
}

func TestIMDS11TokenNeedsNobodyElse(t *testing.T) {
	s := serve(t, &fakeCaller{session: "uid", err: errors.New("everything is down")})
	s.token(t)
}

func TestIMDS13BadTokensAre401AndNoneIsVersion1(t *testing.T) {
	b := &fakeCaller{session: "uid-a", role: "reader", doc: document(t)}
	s := serve(t, b)
	token := s.token(t)
	for _, path := range []string{list, doc, "/latest/meta-data/instance-id", "/latest/meta-data/iam/info"} {
		for name, tt := range map[string]struct {
			h    header
			want int
		}{
			"none":    {nil, 200},
			"own":     {header{tokenHeader: token}, 200},
			"empty":   {header{tokenHeader: ""}, 401},
			"garbage": {header{tokenHeader: "garbage"}, 401},
			"forged":  {header{tokenHeader: "B" + token[1:]}, 401},
		} {
			if status, _, _ := s.do(t, http.MethodGet, path, tt.h); status != tt.want {
				t.Errorf("%s with token %s: %d, want %d", path, name, status, tt.want)
			}
		}
	}
	b.mu.Lock()
	b.session = "uid-b" // the address went to another pod
	b.mu.Unlock()
	if status, _, _ := s.do(t, http.MethodGet, doc, header{tokenHeader: token}); status != http.StatusUnauthorized {
		t.Errorf("another pod's token: %d", status)
	}
}

func TestIMDS15RoleListIsTheBareName(t *testing.T) {
	s := serve(t, &fakeCaller{role: "reader"})
	for _, path := range []string{list, strings.TrimSuffix(list, "/"), "/2021-07-15/meta-data/iam/security-credentials/", "/latest/meta-data//iam/./security-credentials"} {
		status, body, h := s.do(t, http.MethodGet, path, nil)
		if status != 200 || body != "reader" || h.Get("Server") != "EC2ws" || h.Get("Content-Length") != "6" || h.Get("Accept-Ranges") != "none" || h.Get("Last-Modified") == "" {
			t.Errorf("%s: %d %q %v", path, status, body, h)
		}
	}
}

func TestIMDS05MethodsAndErrors(t *testing.T) {
	s := serve(t, &fakeCaller{role: "reader", doc: document(t)})
	for _, method := range []string{"POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "BREW"} {
		if status, _, h := s.do(t, method, doc, nil); status != 405 || h.Get("Allow") != "GET, HEAD" {
			t.Errorf("%s: %d", method, status)
		}
	}
	if status, _, _ := s.do(t, http.MethodGet, "/latest/api/token", nil); status != 405 {
		t.Errorf("GET of the token: %d", status)
	}
	status, body, h := s.do(t, http.MethodHead, doc, nil)
	if status != 200 || body != "" || h.Get("Content-Length") == "" {
		t.Errorf("HEAD: %d %q %v", status, body, h)
	}
	status, body, h = s.do(t, http.MethodGet, "/latest/meta-data/iam/nothing", nil)
	if status != 404 || !strings.HasPrefix(body, "<?xml") || !strings.Contains(body, "404 - Not Found") || h.Get("Content-Type") != "text/html" {
		t.Errorf("%d %q %v", status, body, h)
	}
	if len(s.upstream) != 0 {
		t.Errorf("forwarded: %v", s.upstream)
	}
}

func TestIMDS19AnotherRolesNameIs404(t *testing.T) {
	s := serve(t, &fakeCaller{role: "reader", doc: document(t)})
	for _, role := range []string{"writer", "READER", "reader/x", "reade", "readerr"} {
		if status, _, _ := s.do(t, http.MethodGet, list+role, nil); status != 404 {
			t.Errorf("%s: %d", role, status)
		}
	}
	if status, body, _ := s.do(t, http.MethodGet, doc, nil); status != 200 || !strings.Contains(body, `"Code" : "Success"`) {
		t.Errorf("%d %s", status, body)
	}
}

func TestRefusalsAreAnsweredAsTheySayAndLoggedOnce(t *testing.T) {
	for name, tt := range map[string]struct {
		err    error
		status int
		body   string
	}{
		"IMDS16 no role":            {&Refusal{Status: 404, Err: errTest}, 404, "404 - Not Found"},
		"forbidden":                 {&Refusal{Status: 403, Err: errTest}, 403, "403 - Forbidden"},
		"IMDS21 permanent":          {&Refusal{Status: 403, Code: "AssumeRoleUnauthorizedAccess", Message: `no "way"`, Err: errTest}, 403, `"Message" : "no \"way\""`},
		"IMDS22 transient":          {&Refusal{Status: 500, Err: errTest}, 500, "500 - Internal Server Error"},
		"an error of no known kind": {errors.New("surprise"), 500, "500 - Internal Server Error"},
	} {
		t.Run(name, func(t *testing.T) {
			s := serve(t, &fakeCaller{err: tt.err})
			for range 5 {
				status, body, _ := s.do(t, http.MethodGet, doc, nil)
				if status != tt.status || !strings.Contains(body, tt.body) {
					t.Errorf("%d %s", status, body)
				}
			}
			if n := strings.Count(s.log.String(), "pod refused"); n != 1 || !strings.Contains(s.log.String(), tt.err.Error()) {
				t.Errorf("logged %d times: %s", n, s.log)
			}
		})
	}
}

func TestPathsWithoutASpellingAreNotFoundAndReachNobody(t *testing.T) {
	s := serve(t, &fakeCaller{role: "reader"})
	for _, path := range []string{"/%00", "/latest/%ff", "/latest/a%20b", "/latest/../..", "/latest/%2525252569am", "/a%5cb"} {
		if status, _, _ := s.do(t, http.MethodGet, path, nil); status != http.StatusNotFound {
			t.Errorf("%s: %d", path, status)
		}
	}
	if len(s.upstream) != 0 {
		t.Errorf("forwarded: %v", s.upstream)
	}
}

func TestIMDS25OtherPathsAreForwardedInOneSpelling(t *testing.T) {
	s := serve(t, &fakeCaller{})
	for _, path := range []string{"/latest/meta-data/instance-id", "/latest/%6deta-data/./placement//availability-zone/?recursive=true", "/"} {
		if status, body, _ := s.do(t, http.MethodGet, path, nil); status != 200 || body != "upstream" && path != "/" { // which lists versions only
			t.Errorf("%s: %d %s", path, status, body)
		}
	}
	want := []string{"/latest/meta-data/instance-id", "/latest/meta-data/placement/availability-zone/", "/"}
	if d := cmp.Diff(want, s.upstream); d != "" {
		t.Error(d)
	}
}

func TestIMDS27InfoIsThePodsNotTheNodes(t *testing.T) {
	s := serve(t, &fakeCaller{role: "reader"})
	status, body, _ := s.do(t, http.MethodGet, "/latest/meta-data/iam/info", nil)
	for _, want := range []string{`"Code" : "Success"`, `"LastUpdated" : "`, `"InstanceProfileArn" : "arn:aws:iam::123456789012:instance-profile/reader"`, `"InstanceProfileId" : "AIPA`} {
		if !strings.Contains(body, want) {
			t.Errorf("no %s in %d %s", want, status, body)
		}
	}
	if status, body, _ := s.do(t, http.MethodGet, "/latest/meta-data/iam/", nil); status != 200 || body != "info\nsecurity-credentials/" {
		t.Errorf("%d %q", status, body)
	}
	if len(s.upstream) != 0 {
		t.Errorf("forwarded: %v", s.upstream)
	}
}

func TestConnectionThatWasNotVouchedForIsNotServed(t *testing.T) {
	s := serve(t, &fakeCaller{role: "reader", doc: document(t)})
	bare := httptest.NewServer(s.Config.Handler) // no ConnContext
	defer bare.Close()
	res, err := http.Get(bare.URL + doc)
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	if res.StatusCode != 500 {
		t.Errorf("%d", res.StatusCode)
	}
}

// TestPodCannotFillTheLog has a pod be refused for another reason each time.
func TestPodCannotFillTheLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		h := newTestHandler(Config{Log: slog.New(slog.NewTextHandler(&log, nil))})
		lines := func() int {
			defer log.Reset()
			return strings.Count(log.String(), "pod refused")
		}
		refuse := func(pod netip.Addr, reason string) {
			err := &Refusal{Status: http.StatusNotFound, Err: errors.New(reason)}
			h.refuse(httptest.NewRecorder(), httptest.NewRequest(http.MethodGet, "/", nil), pod, &fakeCaller{}, err)
		}
		for i := range 1000 {
			refuse(podA, fmt.Sprint(i))
		}
		if n := lines(); n != refusalBurst {
			t.Errorf("%d lines for 1000 refusals at once, want %d", n, refusalBurst)
		}
		refuse(podB, "another")
		if n := lines(); n != 1 {
			t.Errorf("%d lines for the neighbour, want 1", n)
		}
		for i := range 1000 {
			time.Sleep(time.Hour / 1000)
			refuse(podA, fmt.Sprint("later ", i))
		}
		if n, want := lines(), refusalBurst*int(time.Hour/refusalInterval); n < want-1 || n > want {
			t.Errorf("%d lines for 1000 refusals in an hour, want %d", n, want)
		}
	})
}

// TestRepeatedRefusalHidesNoOther has SDKs retry a refused request many times before the pod is
// refused for another reason.
func TestRepeatedRefusalHidesNoOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		h := newTestHandler(Config{Log: slog.New(slog.NewTextHandler(&log, nil))})
		refuse := func(reason string) {
			err := &Refusal{Status: http.StatusNotFound, Err: errors.New(reason)}
			h.refuse(httptest.NewRecorder(), httptest.NewRequest(http.MethodGet, "/", nil), podA, &fakeCaller{}, err)
		}
		for range 100 {
			refuse("first reason")
		}
		refuse("second reason")
		if first, second := strings.Count(log.String(), "first"), strings.Count(log.String(), "second"); first != 1 || second != 1 {
			t.Errorf("%d lines of the first reason and %d of the second, want 1 of each", first, second)
		}
	})
}
