package imds

import (
	"context"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// TestOnePodCannotAskWithoutEnd has a pod make requests over all the connections that it may have, as fast as they are answered, and by clients
// that have hung up. The node spends little on it, and its neighbour's requests do not wait.
func TestOnePodCannotAskWithoutEnd(t *testing.T) {
	for name, hungUp := range map[string]bool{"clients that read": false, "clients that hung up": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var refused, delayed atomic.Int64
				h := newTestHandler(Config{
					Caller:   func(netip.Addr, time.Time) Caller { return &fakeCaller{session: "uid", role: "own"} },
					Sessions: NewSessions(NewKey()), Log: slog.New(slog.DiscardHandler),
					Refused: func(int) { refused.Add(1) }, Delayed: func() { delayed.Add(1) },
				})
				limit := newRequestLimit(200)
				ask := func(source netip.Addr, ctx context.Context) int {
					r := httptest.NewRequest(http.MethodGet, "/latest/meta-data/iam/security-credentials/", nil)
					w := httptest.NewRecorder()
					h.ServeHTTP(w, r.WithContext(ConnContext(ctx, newTestConn(new(net.TCPConn), source, limit))))
					return w.Code
				}
				ctx, hangUp := context.WithCancel(t.Context())
				defer hangUp()
				if hungUp {
					hangUp()
				}
				const seconds = 10
				var served, told atomic.Int64
				var asking sync.WaitGroup
				end := time.Now().Add(seconds * time.Second)
				for range maxSourceConnections {
					asking.Go(func() {
						for time.Now().Before(end) {
							if ask(podA, ctx) == http.StatusOK {
								served.Add(1)
							} else {
								told.Add(1)
							}
						}
					})
				}
				for range 20 {
					time.Sleep(seconds * time.Second / 20)
					start := time.Now()
					if code := ask(podB, t.Context()); code != http.StatusOK || time.Since(start) > 0 {
						t.Errorf("the neighbour: %d after %v", code, time.Since(start))
					}
				}
				asking.Wait()
				if n := served.Load(); n < requestBurst+200*seconds-1 || n > requestBurst+200*(seconds+1) {
					t.Errorf("%d were answered", n)
				}
				if n := told.Load(); n == 0 || n > maxSourceConnections*(seconds+1) || n != refused.Load() {
					t.Errorf("%d were refused, %d of them counted", n, refused.Load())
				}
				if n := delayed.Load(); n < 200*seconds {
					t.Errorf("%d were counted as delayed", n)
				}
				time.Sleep(time.Minute)
				if code := ask(podA, t.Context()); code != http.StatusOK {
					t.Errorf("when it has rested: %d", code)
				}
			})
		})
	}
}

// TestThousandRequestsAtOnceDoNotWait has 250 processes of a pod connect and make four requests each. The next
// connection's request waits for the next token, and the client that resumes an hour later does not.
func TestThousandRequestsAtOnceDoNotWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newTestHandler(Config{Log: slog.New(slog.DiscardHandler)})
		limit := newRequestLimit(200)
		start := time.Now()
		dial := func() *conn {
			c := newTestConn(new(net.TCPConn), podA, limit)
			if !c.reserveFirst(time.Now()) {
				t.Fatal("refused")
			}
			return c
		}
		for range 250 {
			c := dial()
			for range 4 {
				if !h.admit(c) || time.Since(start) > 0 {
					t.Fatalf("a request waited %v", time.Since(start))
				}
			}
		}
		next := dial()
		if !h.admit(next) || time.Since(start) != 5*time.Millisecond {
			t.Errorf("request 1,001 waited %v", time.Since(start))
		}
		idle := dial()
		time.Sleep(time.Hour)
		start = time.Now()
		if !h.admit(idle) || time.Since(start) > 0 {
			t.Errorf("a request after an hour waited %v", time.Since(start))
		}
	})
}

// TestConnectionsCostTheSourceTokens has clients of a source use a new connection for each request: well-formed ones,
// ones that net/http answers itself, and none. The source has tokens for exactly requestBurst of them. Further
// connections are reset, and its neighbour is served.
func TestConnectionsCostTheSourceTokens(t *testing.T) {
	for name, tt := range map[string]struct{ request, status string }{
		"well-formed":             {"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", "HTTP/1.1 404 "},
		"without a Host":          {"GET / HTTP/1.1\r\n\r\n", "HTTP/1.1 400 "},
		"not HTTP":                {"?\r\n\r\n", "HTTP/1.1 400 "},
		"with too large a header": {"GET / HTTP/1.1\r\nHost: a\r\nX: " + strings.Repeat("x", 9<<10) + "\r\n\r\n", "HTTP/1.1 431 "},
		"of a later HTTP":         {"GET / HTTP/3.0\r\nHost: a\r\n\r\n", "HTTP/1.1 505 "},
	} {
		t.Run(name, func(t *testing.T) {
			const never = 1e-9 // requests a second
			connections := NewConnections(never)
			connections.perSource, connections.total = 2*requestBurst, 2*requestBurst // net/http closes some late
			l, refused := listening(t, anyHolder, connections)
			s := &http.Server{ConnContext: ConnContext, MaxHeaderBytes: 4 << 10, ErrorLog: log.New(io.Discard, "", 0), Handler: newTestHandler(Config{
				Caller:   func(netip.Addr, time.Time) Caller { return &fakeCaller{session: "uid", role: "own"} },
				Sessions: NewSessions(NewKey()), Log: slog.New(slog.DiscardHandler),
				Upstream: forwarder(func(string) (*Response, error) { return nil, errNotFound }),
			})}
			go s.Serve(l)
			defer s.Close()
			ask := func(source string) string {
				d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(source)}}
				c, err := d.Dial("tcp", l.Addr().String())
				if err != nil {
					return err.Error() // reset sooner than this end saw the connection
				}
				defer c.Close()
				c.SetDeadline(time.Now().Add(20 * time.Second))
				io.WriteString(c, tt.request)
				answer := make([]byte, len(tt.status))
				if _, err := io.ReadFull(c, answer); err != nil {
					return err.Error()
				}
				return string(answer)
			}
			for i := range requestBurst {
				if got := ask("127.0.0.1"); got != tt.status {
					t.Fatalf("connection %d: %s", i+1, got)
				}
			}
			for range 10 {
				if got := ask("127.0.0.1"); got == tt.status {
					t.Errorf("a connection beyond the source's tokens: %s, want none", got)
				}
			}
			if got := ask("127.0.0.2"); got != tt.status {
				t.Errorf("the neighbour: %s", got)
			}
			if n := refused.Load(); n != 10 {
				t.Errorf("%d refused connections were counted, want 10", n)
			}
		})
	}
}
