package imds

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// node is a node's metadata service: it wants version 2 and writes down what it was sent.
type node struct {
	*httptest.Server
	tokens  atomic.Int64 // made so far; the last one is the valid one
	tries   atomic.Int64 // for a token
	revoked atomic.Bool
	broken  atomic.Bool // tokens fail
	seen    atomic.Pointer[http.Request]
	answer  http.HandlerFunc
	v1      bool
}

func newNode(t *testing.T, answer http.HandlerFunc) (*node, *Upstream) {
	t.Helper()
	n := &node{answer: answer}
	n.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPut {
			n.tries.Add(1)
			if n.broken.Load() {
				w.WriteHeader(http.StatusServiceUnavailable)
				return
			}
			if n.v1 {
				w.WriteHeader(http.StatusNotFound)
				return
			}
			n.revoked.Store(false)
			fmt.Fprintf(w, "token-%d", n.tokens.Add(1))
			return
		}
		n.seen.Store(r.Clone(r.Context()))
		if !n.v1 && (n.revoked.Load() || r.Header.Get(tokenHeader) != fmt.Sprintf("token-%d", n.tokens.Load())) {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		n.answer(w, r)
	}))
	t.Cleanup(n.Close)
	u, err := NewUpstream(strings.TrimPrefix(n.URL, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	return n, u
}

func text(s string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain")
		w.Header().Set("X-Internal", "secret")
		io.WriteString(w, s)
	}
}

func ask(u *Upstream, path string) (status int, res Response) {
	return forwarded(context.Background(), u, podA, path)
}

func TestIMDS25PodsTokenStaysAndTheNodesOwnIsUsed(t *testing.T) {
	n, u := newNode(t, text("i-1234"))
	s := serve(t, &fakeCaller{session: "uid"}, func(c *Config) { c.Upstream = u })
	sent := header{tokenHeader: s.token(t), "X-Forwarded-For": "1.2.3.4", "Cookie": "x"}
	for range 3 {
		status, body, h := s.do(t, http.MethodGet, "/latest/meta-data/instance-id", sent)
		if status != 200 || body != "i-1234" || h.Get("X-Internal") != "" {
			t.Fatalf("%d %s %v", status, body, h)
		}
	}
	if n.tokens.Load() != 1 {
		t.Errorf("%d tokens for three requests", n.tokens.Load())
	}
	seen := n.seen.Load().Header
	if seen.Get(tokenHeader) != "token-1" || seen.Get("X-Forwarded-For") != "" || seen.Get("Cookie") != "" {
		t.Errorf("the service saw %v", seen)
	}
}

func TestIMDS25TokenIsRenewedOn401(t *testing.T) {
	n, u := newNode(t, text("x"))
	ask(u, "/latest/meta-data/")
	n.revoked.Store(true)
	if status, _ := ask(u, "/latest/meta-data/"); status != 200 || n.tokens.Load() != 2 {
		t.Errorf("%d with %d tokens", status, n.tokens.Load())
	}
}

func TestServiceOfVersion1IsAskedWithoutToken(t *testing.T) {
	n, u := newNode(t, text("x"))
	n.v1 = true
	if status, _ := ask(u, "/latest/meta-data/"); status != 200 || n.seen.Load().Header.Get(tokenHeader) != "" {
		t.Errorf("%d", status)
	}
}

func TestStrangeAnswersOfTheServiceAreErrors(t *testing.T) {
	for name, tt := range map[string]struct {
		answer http.HandlerFunc
		want   int
	}{
		"not found":    {http.NotFound, 404},
		"unauthorized": {func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(401) }, 500},
		"forbidden":    {func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(403) }, 500},
		"throttled":    {func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(429) }, 500},
		"redirection":  {func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/latest/meta-data/iam/info", 302) }, 500},
		"too much": {func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, strings.Repeat("a", maxBody+1))
		}, 500},
		"without an end": {func(w http.ResponseWriter, r *http.Request) {
			for r.Context().Err() == nil {
				if _, err := w.Write(make([]byte, 64<<10)); err != nil {
					return
				}
			}
		}, 500},
		"cut off": {func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "10")
			io.WriteString(w, "short")
		}, 500},
	} {
		t.Run(name, func(t *testing.T) {
			_, u := newNode(t, tt.answer)
			if status, _ := ask(u, "/latest/meta-data/"); status != tt.want {
				t.Errorf("%d, want %d", status, tt.want)
			}
		})
	}
}

func TestServiceThatIsDownIs500(t *testing.T) {
	n, u := newNode(t, text("x"))
	n.Close()
	if status, _ := ask(u, "/latest/meta-data/"); status != 500 {
		t.Errorf("%d", status)
	}
}

func TestServiceThatIsDownIsLeftAloneForAMoment(t *testing.T) {
	n, u := newNode(t, text("x"))
	n.broken.Store(true)
	for range 5 {
		if status, _ := ask(u, "/latest/meta-data/"); status != 500 {
			t.Errorf("%d", status)
		}
	}
	if tries := n.tries.Load(); tries != 1 {
		t.Errorf("%d tries for a token, want 1", tries)
	}
	n.broken.Store(false)
	u.mu.Lock()
	u.retryAt = time.Time{} // the moment is over
	u.mu.Unlock()
	if status, _ := ask(u, "/latest/meta-data/"); status != 200 {
		t.Errorf("back again: %d", status)
	}
}

func TestAddressOfTheService(t *testing.T) {
	for _, good := range []string{"169.254.169.254", "169.254.169.254:80", "[fd00:ec2::254]", "localhost:1338"} {
		if _, err := NewUpstream(good); err != nil {
			t.Errorf("%s: %v", good, err)
		}
	}
	for _, bad := range []string{"", "http://x", "a/b", "user@host", "a b", "host?x"} {
		if _, err := NewUpstream(bad); err == nil {
			t.Errorf("%q: no error", bad)
		}
	}
}

// TestMetadataNeverGoesToAWebProxy asks for metadata in a process whose environment names an HTTP proxy. net/http reads the
// environment once, so that the test runs itself in a process of its own.
func TestMetadataNeverGoesToAWebProxy(t *testing.T) {
	const service, webProxy = "192.0.2.1:80", "192.0.2.2:3128"
	if os.Getenv("HTTP_PROXY") != "http://"+webProxy {
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
		cmd.Env = append(os.Environ(), "HTTP_PROXY=http://"+webProxy, "http_proxy=http://"+webProxy, "NO_PROXY=", "no_proxy=")
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	dialled := func(client *http.Client, ask func() error) []string {
		var addresses []string
		transport := client.Transport.(*http.Transport)
		transport.DialContext = func(_ context.Context, _, address string) (net.Conn, error) {
			addresses = append(addresses, address)
			return nil, errors.New("no network")
		}
		if err := ask(); err == nil {
			t.Error("an answer without a network")
		}
		return addresses
	}
	u, err := NewUpstream(service)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{service}
	if got := dialled(u.client, func() error { _, err := u.Get(t.Context(), "/latest/meta-data/placement/region"); return err }); !slices.Equal(got, want) {
		t.Errorf("dialled %v, want %v", got, want)
	}
	// The control: an ordinary client of this process does use the proxy.
	ordinary := &http.Client{Transport: http.DefaultTransport.(*http.Transport).Clone()}
	if got := dialled(ordinary, func() error { _, err := ordinary.Get("http://" + service); return err }); !slices.Equal(got, []string{webProxy}) {
		t.Errorf("an ordinary client dialled %v, want the proxy", got)
	}
}
