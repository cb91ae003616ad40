package imds

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

var podA, podB = netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")

// TestIMDS28LastingAnswersAreAskedForOnce holds that what does not change is asked for once in a while, for all pods, and that
// what may change, is denied or fails is not kept. The time is that of the test's bubble.
func TestIMDS28LastingAnswersAreAskedForOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var asked atomic.Int64
		status := http.StatusOK
		u := upstreamBy(t, func(r *http.Request) (*http.Response, error) {
			if r.Method == http.MethodPut {
				return response(200, "token"), nil
			}
			asked.Add(1)
			return response(status, "i-1"), nil
		})
		times := func(want int64, what string) {
			t.Helper()
			if got := asked.Swap(0); got != want {
				t.Errorf("%s: asked %d times, want %d", what, got, want)
			}
		}
		const id = "/latest/meta-data/instance-id"
		for range 200 {
			for _, pod := range []netip.Addr{podA, podB} {
				if status, res := forwarded(t.Context(), u, pod, id); status != 200 || res.body != "i-1" || res.contentType[0] != "text/plain" {
					t.Fatalf("%d %v", status, res)
				}
			}
		}
		times(1, "within a moment")
		time.Sleep(cacheTime)
		forwarded(t.Context(), u, podA, id)
		times(1, "after the moment")

		for range 5 {
			forwarded(t.Context(), u, podA, "/latest/meta-data/spot/instance-action")
		}
		times(5, "what may change")
		for range 3 {
			forwarded(t.Context(), u, podA, "/2021-07-15/meta-data/instance-id")
		}
		times(3, "another version, of which there are many")

		status = http.StatusNotFound
		for range 3 {
			if status, _ := forwarded(t.Context(), u, podA, "/latest/meta-data/ami-id"); status != 404 {
				t.Errorf("not found: %d", status)
			}
		}
		times(3, "what is not found")
		status = http.StatusInternalServerError
		if status, _ := forwarded(t.Context(), u, podA, "/latest/meta-data/ami-id"); status != 500 {
			t.Errorf("failed: %d", status)
		}
		times(1, "what fails")
	})
}

// upstreamBy is an Upstream that asks a function instead of a service.
func upstreamBy(t *testing.T, service roundTrip) *Upstream {
	t.Helper()
	u, err := NewUpstream("metadata")
	if err != nil {
		t.Fatal(err)
	}
	u.client.Transport = service
	return u
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func response(status int, body string) *http.Response {
	return &http.Response{StatusCode: status, ContentLength: int64(len(body)), Header: http.Header{"Content-Type": {"text/plain"}, "X-Internal": {"1"}}, Body: io.NopCloser(strings.NewReader(body))}
}

// TestIMDS28ManyAtOnceAreOneQuestion has pods make more requests at once for what is not cached yet than they may make
// exchanges, and the first client disconnect.
func TestIMDS28ManyAtOnceAreOneQuestion(t *testing.T) {
	var asked atomic.Int64
	answer := make(chan struct{})
	_, u := newNode(t, func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		<-answer
		text("i-1")(w, r)
	})
	ctx, leave := context.WithCancel(t.Context())
	var done sync.WaitGroup
	ask := func(ctx context.Context, pod netip.Addr) {
		if status, res := forwarded(ctx, u, pod, "/latest/meta-data/instance-id"); ctx.Err() == nil && (status != 200 || res.body != "i-1") {
			t.Errorf("%s: %d", pod, status)
		}
	}
	done.Go(func() { ask(ctx, podA) })
	for asked.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	next := podB
	for range 50 {
		pod := next
		for range 2 * maxPodExchanges {
			done.Go(func() { ask(context.WithoutCancel(t.Context()), pod) })
		}
		next = pod.Next()
	}
	leave()
	close(answer)
	done.Wait()
	if n := asked.Load(); n != 1 {
		t.Errorf("asked %d times", n)
	}
}

// TestOnePodCannotUseUpTheService has a pod ask without an end, and hold answers open: it is told to come later, and its neighbour
// is served.
func TestOnePodCannotUseUpTheService(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		u := upstreamBy(t, func(r *http.Request) (*http.Response, error) {
			if strings.HasSuffix(r.URL.Path, "slow") {
				<-r.Context().Done()
				return nil, r.Context().Err()
			}
			return response(200, "x"), nil
		})
		statuses := make(map[int]int)
		for range 1000 {
			status, _ := forwarded(t.Context(), u, podA, "/latest/meta-data/x")
			statuses[status]++
		}
		if statuses[200] != podBurst || statuses[503] != 1000-podBurst {
			t.Errorf("a thousand at once: %v", statuses)
		}
		if status, _ := forwarded(t.Context(), u, podB, "/latest/meta-data/x"); status != 200 {
			t.Errorf("its neighbour: %d", status)
		}
		time.Sleep(time.Second)
		statuses = make(map[int]int)
		for range 100 {
			status, _ := forwarded(t.Context(), u, podA, "/latest/meta-data/x")
			statuses[status]++
		}
		if statuses[200] != podRate {
			t.Errorf("a second later: %v", statuses)
		}

		time.Sleep(time.Minute)
		var held sync.WaitGroup
		for range maxExchanges {
			held.Go(func() { forwarded(t.Context(), u, podA, "/latest/meta-data/slow") })
		}
		synctest.Wait()
		if status, _ := forwarded(t.Context(), u, podA, "/latest/meta-data/x"); status != 503 {
			t.Errorf("with all of its share in use: %d", status)
		}
		if status, _ := forwarded(t.Context(), u, podB, "/latest/meta-data/x"); status != 200 {
			t.Errorf("its neighbour: %d", status)
		}
		held.Wait()
		if len(u.limit.active) > 0 {
			t.Errorf("still held: %v", u.limit.active)
		}
	})
}

// TestWhatAPodHasSetGoingStaysItsOwn has a pod ask a service that hangs for all that is kept, in either spelling, and leave at once: it
// has its share of what goes on, and its neighbour has the rest.
func TestWhatAPodHasSetGoingStaysItsOwn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var exchanges atomic.Int64
		u := upstreamBy(t, func(r *http.Request) (*http.Response, error) {
			if r.Method == http.MethodPut {
				return response(200, "token"), nil
			}
			if isCacheable(r.URL.Path) {
				exchanges.Add(1)
				defer exchanges.Add(-1)
				<-r.Context().Done()
				return nil, r.Context().Err()
			}
			return response(200, "x"), nil
		})
		for range 3 {
			for path := range cacheable {
				for _, slash := range []string{"", "/"} {
					leaves, leave := context.WithCancel(t.Context())
					time.AfterFunc(20*time.Millisecond, leave)
					go forwarded(leaves, u, podA, "/latest/"+path+slash)
				}
			}
			time.Sleep(20 * time.Millisecond)
			synctest.Wait()
			if exchanges.Load() == 0 {
				t.Error("nothing goes on after the client disconnected")
			}
			if exchanges.Load() > maxPodExchanges || u.limit.active[podA] > maxPodExchanges {
				t.Errorf("it has %d slots, %d of them on its account", exchanges.Load(), u.limit.active[podA])
			}
			start := time.Now()
			if status, _ := forwarded(t.Context(), u, podB, "/latest/meta-data/x"); status != 200 || time.Since(start) > 0 {
				t.Errorf("its neighbour: %d after %v", status, time.Since(start))
			}
			time.Sleep(time.Second)
		}
		time.Sleep(2 * upstreamTimeout)
		synctest.Wait()
		if exchanges.Load() > 0 || len(u.limit.active) > 0 {
			t.Errorf("%d slots and %v are held for nobody", exchanges.Load(), u.limit.active)
		}
	})
}

// TestLimitOfOnePodIsNotThatOfOthers has a pod request a cacheable path while the request of a pod
// that is over its limit is in progress.
func TestLimitOfOnePodIsNotThatOfOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var cache responseCache
		const id = "/latest/meta-data/instance-id"
		decided := make(chan struct{})
		go cache.get(t.Context(), id, func(context.Context, string) (*Response, error) {
			<-decided
			return nil, errPodRate
		})
		synctest.Wait()
		time.AfterFunc(time.Second, func() { close(decided) })
		res, err := cache.get(t.Context(), id, func(context.Context, string) (*Response, error) {
			return &Response{body: "i-1"}, nil
		})
		if err != nil || res.body != "i-1" {
			t.Errorf("%v, %v", res, err)
		}
	})
}

// TestIMDS28NodeKeepsToItsAllowance has many pods ask as much as each may.
func TestIMDS28NodeKeepsToItsAllowance(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var asked int
		u := upstreamBy(t, func(r *http.Request) (*http.Response, error) {
			asked++
			return response(200, "x"), nil
		})
		pod := podA
		for range 100 {
			pod = pod.Next()
			for range podBurst {
				forwarded(t.Context(), u, pod, "/latest/meta-data/x")
			}
		}
		if asked > nodeRate+1 { // and a token
			t.Errorf("the service was asked %d times at once", asked)
		}
	})
}

// TestOnePodCannotTakeAllConnections holds how many one address may have open; what it closes it may open again.
func TestOnePodCannotTakeAllConnections(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	refused := make(chan struct{}, 100)
	connections := NewConnections(0)
	connections.perSource = 3
	l := NewListener(inner, func(netip.Addr, netip.AddrPort) bool { return true }, anyHolder, connections, func() { refused <- struct{}{} }, slog.New(slog.DiscardHandler))
	defer l.Close()
	accepted := make(chan net.Conn, 100)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			accepted <- c
		}
	}()
	dial := func() {
		c, err := net.Dial("tcp", inner.Addr().String())
		if err != nil {
			return // reset sooner than this end saw the connection
		}
		t.Cleanup(func() { c.Close() })
	}
	var open []net.Conn
	for range 3 {
		dial()
		open = append(open, <-accepted)
	}
	for range 5 {
		dial()
		<-refused
	}
	open[0].Close()
	open[0].Close() // once more, as net/http may: it gives no second place
	dial()
	open[0] = <-accepted
	dial()
	<-refused
	for _, c := range open {
		c.Close()
	}
	if connections.Len() > 0 || len(connections.count) > 0 {
		t.Errorf("still held: %v", connections.open)
	}
}
