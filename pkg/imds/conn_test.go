package imds

import (
	"bufio"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// limited is a server as the proxy has it, with times that a test can wait for, whose handler is h.
func limited(t *testing.T, h http.HandlerFunc) (address string, l *Listener) {
	t.Helper()
	address, l, _ = limitedFor(t, anyHolder, 10*time.Millisecond, h)
	return address, l
}

// limitedFor is limited for pods that holder tells, with the time between two sweeps.
func limitedFor(t *testing.T, holder Holder, every time.Duration, h http.HandlerFunc) (address string, l *Listener, refused *atomic.Int64) {
	t.Helper()
	l, refused = listening(t, holder, NewConnections(0))
	l.connections.sweepInterval = every
	s := &http.Server{ConnContext: ConnContext, ReadTimeout: 200 * time.Millisecond, IdleTimeout: 200 * time.Millisecond, Handler: h}
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })
	return l.Addr().String(), l, refused
}

// listening is a Listener on the loopback that takes connections from everywhere and counts those that it refuses.
func listening(t *testing.T, holder Holder, connections *Connections) (l *Listener, refused *atomic.Int64) {
	t.Helper()
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	refused = new(atomic.Int64)
	every := func(netip.Addr, netip.AddrPort) bool { return true }
	return NewListener(inner, every, holder, connections, func() { refused.Add(1) }, slog.New(slog.DiscardHandler)), refused
}

// TestSlowClientsAreClosed has clients that send nothing, half a request, or a request and then nothing, and bodies that are
// not read completely. Only a complete request is answered, and each connection is closed.
func TestSlowClientsAreClosed(t *testing.T) {
	address, l := limited(t, func(w http.ResponseWriter, r *http.Request) {
		r.Context().Value(connKey{}).(*conn).finishRead(r) // as Handler does
		io.WriteString(w, "done")
	})
	const put = "PUT / HTTP/1.1\r\nHost: a\r\n"
	for name, tt := range map[string]struct {
		sent     string
		answered bool
	}{
		"nothing":               {"", false},
		"half a header":         {"GET / HTTP/1.1\r\nHost:", false},
		"a request, and rests":  {"GET / HTTP/1.1\r\nHost: a\r\n\r\n", true},
		"a body without an end": {put + "Content-Length: 1000\r\n\r\nx", false},
		"a chunk without one":   {put + "Transfer-Encoding: chunked\r\n\r\n5\r\nx", false},
		"a malformed chunk":     {put + "Transfer-Encoding: chunked\r\n\r\nx", false},
		"a body that is long":   {put + "Content-Length: 5000\r\n\r\n" + strings.Repeat("x", 5000), false},
	} {
		c, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(10 * time.Second))
		io.WriteString(c, tt.sent)
		answer, err := io.ReadAll(c)
		if errors.Is(err, os.ErrDeadlineExceeded) || strings.Contains(string(answer), "done") != tt.answered {
			t.Errorf("%s: %q, %v; want an answer: %v, and the connection's end", name, answer, err, tt.answered)
		}
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		left := l.connections.Len()
		if left == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d connections are left", left)
		}
	}
}

// TestSlowAnswersAreNotCut has an answer take longer than a request may: who asked has it, and may ask again.
func TestSlowAnswersAreNotCut(t *testing.T) {
	address, _ := limited(t, func(w http.ResponseWriter, r *http.Request) {
		r.Context().Value(connKey{}).(*conn).finishRead(r) // as Handler does
		select {
		case <-time.After(400 * time.Millisecond):
			io.WriteString(w, "late")
		case <-r.Context().Done():
			io.WriteString(w, "ended")
		}
	})
	c, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	in := bufio.NewReader(c)
	for _, request := range []string{
		"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc",
		"PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
	} {
		io.WriteString(c, request)
		res, err := http.ReadResponse(in, nil)
		if err != nil {
			t.Fatal(err)
		}
		if body, err := io.ReadAll(res.Body); string(body) != "late" || err != nil {
			t.Errorf("%q, %v", body, err)
		}
	}
}

// TestClientThatLeavesEndsItsRequest holds that a request ends with its client, which nobody answers any more.
func TestClientThatLeavesEndsItsRequest(t *testing.T) {
	began, ended := make(chan struct{}), make(chan struct{})
	address, _ := limited(t, func(_ http.ResponseWriter, r *http.Request) {
		r.Context().Value(connKey{}).(*conn).finishRead(r)
		close(began)
		<-r.Context().Done()
		close(ended)
	})
	c, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(c, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
	<-began
	c.Close()
	select {
	case <-ended:
	case <-time.After(10 * time.Second):
		t.Error("the request goes on")
	}
}
