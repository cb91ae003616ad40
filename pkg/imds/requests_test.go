package imds

import (
	"context"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
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
				h := NewHandler(Config{
					Caller:   func(netip.Addr, time.Time) Caller { return &fakeCaller{session: "uid", role: "own"} },
					Sessions: NewSessions(NewKey()), Log: slog.New(slog.DiscardHandler), RequestsPerSecond: 200,
					Refused: func(int) { refused.Add(1) }, Delayed: func() { delayed.Add(1) },
				})
				ask := func(source netip.Addr, ctx context.Context) int {
					r := httptest.NewRequest(http.MethodGet, "/latest/meta-data/iam/security-credentials/", nil)
					w := httptest.NewRecorder()
					h.ServeHTTP(w, r.WithContext(ConnContext(ctx, &conn{source: source})))
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
				for range maxConnections {
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
				if n := told.Load(); n == 0 || n > maxConnections*(seconds+1) || n != refused.Load() {
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

// TestPodsBurstDoesNotWait has three hundred processes of a pod start at once.
func TestPodsBurstDoesNotWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := NewHandler(Config{RequestsPerSecond: 200, Log: slog.New(slog.DiscardHandler)})
		start := time.Now()
		for range 3 * 300 {
			if !h.admit(podA) || time.Since(start) > 0 {
				t.Fatalf("one waited %v", time.Since(start))
			}
		}
	})
}
