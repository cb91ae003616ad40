package netns

import (
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

const (
	relayMark = 0x6b32
	tokenPath = "/latest/api/token"
	ttlHeader = "X-aws-ec2-metadata-token-ttl-seconds"
	tokenName = "X-aws-ec2-metadata-token"
)

// relay runs a relay inside the pod, between its clients and its redirection. spoil answers a
// request itself and returns true, or changes it before the relay forwards it to the proxy.
func (n *node) relay(pod *testbed.Sandbox, spoil func(w http.ResponseWriter, r *http.Request) bool) {
	n.t.Helper()
	for _, command := range [][]string{
		{"ip", "link", "set", "lo", "up"},
		{"iptables-nft", "-t", "nat", "-A", "OUTPUT", "-p", "tcp", "-d", "169.254.169.254", "--dport", "80", "-m", "mark", "!", "--mark", "0x6b32", "-j", "REDIRECT", "--to-ports", "8000"},
	} {
		_, err := pod.Netns.Run(n.t.Context(), n.ClientEnv(), command[0], command[1:]...)
		n.must(err)
	}
	listener, err := pod.Netns.Listen("tcp", "127.0.0.1:8000")
	n.must(err)
	marked := net.Dialer{Control: func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, relayMark) })
	}}
	to := &httputil.ReverseProxy{
		ErrorLog: log.New(io.Discard, "", 0), // clients leave
		Rewrite:  func(r *httputil.ProxyRequest) { r.SetURL(&url.URL{Scheme: "http", Host: testbed.MetadataAddr}) },
		Transport: &http.Transport{
			DisableCompression: true, DisableKeepAlives: true,
			Dial: func(network, address string) (c net.Conn, err error) {
				err = pod.Netns.Do(func() error {
					c, err = marked.Dial(network, address)
					return err
				})
				return c, err
			},
		},
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !spoil(w, r) {
			to.ServeHTTP(w, r)
		}
	})}
	go server.Serve(listener)
	n.t.Cleanup(func() { server.Close() })
}

// token returns a session token of the pod.
func (n *node) token(pod *testbed.Sandbox, seconds string) string {
	n.t.Helper()
	got := n.request(pod, http.MethodPut, tokenPath, ttlHeader, seconds)
	if got.status != http.StatusOK {
		n.t.Fatalf("PUT token: %s", got)
	}
	return got.body
}

// TestClientsWithoutTokens: requests for a token are refused, fail, or are answered late or
// never. Clients that fall back to version 1 are served; the others report why not.
func TestClientsWithoutTokens(t *testing.T) {
	onClients(t, func(t *testing.T, n *node, c client) {
		n.proxy(impatient...)
		refuses := func(status int) func(http.ResponseWriter, *http.Request) bool {
			return func(w http.ResponseWriter, _ *http.Request) bool {
				w.WriteHeader(status)
				return true
			}
		}
		for name, tc := range map[string]struct {
			put  func(http.ResponseWriter, *http.Request) bool
			says string
		}{
			"unauthorized": {refuses(http.StatusUnauthorized), c.put401},
			"unavailable":  {refuses(http.StatusServiceUnavailable), c.put503},
			"silent":       {func(_ http.ResponseWriter, r *http.Request) bool { <-r.Context().Done(); return true }, ""},
			// Later than Go's second SDK waits, and sooner than others do.
			"late": {func(_ http.ResponseWriter, r *http.Request) bool {
				select {
				case <-time.After(700 * time.Millisecond):
				case <-r.Context().Done():
				}
				return false
			}, ""},
		} {
			pod := n.run(name, "app")
			n.relay(pod, func(w http.ResponseWriter, r *http.Request) bool { return r.Method == http.MethodPut && tc.put(w, r) })
			if tc.says != "" {
				n.starts(pod, c).wantFailure(tc.says)
			} else {
				n.starts(pod, c).wantOwn("app")
			}
		}
	})
}

// TestClientsWithAnExpiredToken: a client whose token expires before its second use gets another
// one, or fails and succeeds the next time.
func TestClientsWithAnExpiredToken(t *testing.T) {
	onClients(t, func(t *testing.T, n *node, c client) {
		n.proxy(impatient...)
		pod := n.run("pod", "app")
		ended := n.token(pod, "1")
		n.eventually(func() bool { return n.get(pod, credentials, tokenName, ended).status == http.StatusUnauthorized })
		var spoilt atomic.Bool
		n.relay(pod, func(w http.ResponseWriter, r *http.Request) bool {
			if strings.HasSuffix(r.URL.Path, credentials+"app") && spoilt.CompareAndSwap(false, true) {
				r.Header.Set(tokenName, ended)
			}
			return false
		})
		p := n.starts(pod, c)
		if c.get401 != "" {
			p.wantFailure(c.get401)
			p = n.starts(pod, c)
		}
		p.wantOwn("app")
		if !spoilt.Load() {
			t.Error("no client used the ended token")
		}
	})
}

// TestClientsKeepTheirTokens: a token that the proxy issued before its restart stays valid.
func TestClientsKeepTheirTokens(t *testing.T) {
	onClients(t, func(t *testing.T, n *node, c client) {
		proxy := n.proxy(impatient...)
		pod := n.run("pod", "app")
		before := n.token(pod, "21600")
		n.must(proxy.Stop())
		n.proxy(impatient...)
		var used atomic.Int32
		n.relay(pod, func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodPut {
				w.Header().Set(ttlHeader, "21600")
				w.Write([]byte(before))
				return true
			}
			if r.Header.Get(tokenName) == before {
				used.Add(1)
			}
			return false
		})
		n.starts(pod, c).wantOwn("app")
		if used.Load() < 2 {
			t.Errorf("%d requests had the token", used.Load())
		}
	})
}
