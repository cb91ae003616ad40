//go:build !race

// Under the race detector a sync.Pool forgets at random, and allocations are not what they are.

package imds

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"testing"
	"time"
)

// nobody is a ResponseWriter whose answers go nowhere.
type nobody struct {
	header http.Header
	status int
}

func (w *nobody) Header() http.Header         { return w.header }
func (w *nobody) Write(b []byte) (int, error) { return len(b), nil }
func (w *nobody) WriteHeader(status int)      { w.status = status }

// cachedRequest is a handler and a request for the cached document with a valid token, as they stand on a connection.
func cachedRequest(tb testing.TB, d *fakeCaller) (*Handler, *http.Request) {
	sessions := NewSessions(NewKey())
	h := newTestHandler(Config{Caller: func(netip.Addr, time.Time) Caller { return d }, Sessions: sessions, Log: slog.New(slog.DiscardHandler)})
	ctx := ConnContext(context.Background(), newTestConn(new(net.TCPConn), netip.MustParseAddr("10.0.0.1"), newRequestLimit(0)))
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://169.254.169.254"+doc, nil)
	if err != nil {
		tb.Fatal(err)
	}
	r.Header.Set(tokenHeader, sessions.Token(d.session, time.Now().Add(time.Hour)))
	return h, r
}

func TestCachedDocumentCostsAtMostFourAllocations(t *testing.T) {
	h, r := cachedRequest(t, &fakeCaller{session: "uid", role: "reader", doc: document(t)})
	w := &nobody{header: make(http.Header, 8)}
	allocs := testing.AllocsPerRun(1000, func() { h.ServeHTTP(w, r) })
	if w.status != 0 || allocs > 4 {
		t.Errorf("%v allocations, status %d", allocs, w.status)
	}
}

func BenchmarkCachedDocument(b *testing.B) {
	d := &fakeCaller{session: "2dc1e8a2-1a02-4a3b-9d80-1f3a6b8b6b64", role: "reader", doc: document(b)}
	h, r := cachedRequest(b, d)
	w := &nobody{header: make(http.Header, 8)}
	b.ReportAllocs()
	for b.Loop() {
		h.ServeHTTP(w, r)
	}
}
