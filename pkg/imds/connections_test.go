package imds

import (
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// sources returns n addresses of pods.
func sources(n int) []netip.Addr {
	all := []netip.Addr{podA}
	for len(all) < n {
		all = append(all, all[len(all)-1].Next())
	}
	return all
}

// TestConnectionsAreSharedFairly has pods open and close connections at random, some as many as they can. At every moment the bounds hold, a
// pod that has fewer than its share of the total may open one, and no pod loses a connection within its share.
func TestConnectionsAreSharedFairly(t *testing.T) {
	for seed := range uint64(20) {
		r := rand.New(rand.NewPCG(seed, 0))
		pods := sources(2 + r.IntN(40))
		cs := NewConnections(0)
		cs.sweepInterval = time.Hour // the connections of this test have no sockets
		cs.total, cs.perSource = 50+r.IntN(200), 10+r.IntN(90)
		share := cs.total / len(pods) // at least, for pods without connections leave the others more
		held := make(map[netip.Addr][]*conn)
		count := 0
		for range 3000 {
			pod := pods[r.IntN(len(pods))]
			if r.IntN(3) == 0 {
				pod = pods[0] // which wants more than the others
			}
			if mine := held[pod]; len(mine) > 0 && r.IntN(len(pods)) == 0 {
				i := r.IntN(len(mine))
				cs.remove(mine[i])
				cs.remove(mine[i])
				held[pod] = append(mine[:i:i], mine[i+1:]...)
				count--
				continue
			}
			c := &conn{source: pod}
			before := len(held[pod])
			replaced, ok := cs.add(c)
			if !ok && before < share-1 && before < cs.perSource {
				t.Fatalf("seed %d: refused with %d of a share of %d", seed, before, share)
			}
			if ok {
				held[pod] = append(held[pod], c)
				count++
			}
			if replaced != nil {
				loser := replaced.source
				for i, other := range held[loser] {
					if other == replaced {
						held[loser] = append(held[loser][:i:i], held[loser][i+1:]...)
						count--
						break
					}
				}
				if left := len(held[loser]); left < len(held[pod]) || left < share-1 || !ok {
					t.Fatalf("seed %d: one has %d left for another's %d, of a share of %d", seed, left, len(held[pod]), share)
				}
			}
			if count != len(cs.open) || len(cs.open) > cs.total || len(held[pod]) != cs.count[pod] || len(held[pod]) > cs.perSource {
				t.Fatalf("seed %d: %d connections of %d counted as %d; the pod has %d, counted as %d", seed, count, cs.total, len(cs.open), len(held[pod]), cs.count[pod])
			}
		}
		for _, all := range held {
			for _, c := range all {
				cs.remove(c)
			}
		}
		if len(cs.open) != 0 || len(cs.count) != 0 {
			t.Errorf("seed %d: %d are left, of %d sources", seed, len(cs.open), len(cs.count))
		}
	}
}

// TestReplacedConnectionIsIdle holds that a connection with a request in progress gives way last.
func TestReplacedConnectionIsIdle(t *testing.T) {
	cs := NewConnections(0)
	cs.sweepInterval = time.Hour // the connections of this test have no sockets
	cs.total = 4
	busy, idle, alsoBusy := &conn{source: podA}, &conn{source: podA}, &conn{source: podA}
	busy.isBusy.Store(true)
	alsoBusy.isBusy.Store(true)
	for _, c := range []*conn{busy, idle, alsoBusy} {
		cs.add(c)
	}
	cs.add(&conn{source: podB.Next()})
	if replaced, ok := cs.add(&conn{source: podB}); !ok || replaced != idle {
		t.Errorf("%v, %v", replaced, ok)
	}
}

// TestFullProxyServesAPodWithoutConnections has one pod hold all connections that there may be. Another pod is served, and one of the first's
// is closed for it.
func TestFullProxyServesAPodWithoutConnections(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	connections := NewConnections(0)
	connections.total = 5
	refused := make(chan struct{}, 100)
	l := NewListener(inner, func(netip.Addr, netip.AddrPort) bool { return true }, anyHolder, connections, func() { refused <- struct{}{} }, slog.New(slog.DiscardHandler))
	s := &http.Server{ConnContext: ConnContext, IdleTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		writeText(w, r.Context().Value(connKey{}).(*conn).source.String())
	})}
	go s.Serve(l)
	defer s.Close()
	dial := func(source string) net.Conn {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(source)}}
		c, err := d.Dial("tcp", inner.Addr().String())
		if err != nil {
			return nil // reset sooner than this end saw the connection
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	ask := func(c net.Conn) string {
		if c == nil {
			return "reset"
		}
		if _, err := c.Write([]byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n")); err != nil {
			return err.Error()
		}
		b := make([]byte, 1024)
		n, err := c.Read(b)
		if err != nil {
			return err.Error()
		}
		_, body, _ := strings.Cut(string(b[:n]), "\r\n\r\n")
		return body
	}
	var greedy []net.Conn
	for range connections.total {
		greedy = append(greedy, dial("127.0.0.1"))
		if got := ask(greedy[len(greedy)-1]); got != "127.0.0.1" {
			t.Fatal(got)
		}
	}
	if got := ask(dial("127.0.0.1")); got == "127.0.0.1" {
		t.Error("the greedy pod has one connection more than there may be")
	}
	<-refused
	if got := ask(dial("127.0.0.2")); got != "127.0.0.2" {
		t.Errorf("a pod without connections: %s", got)
	}
	<-refused
	served := 0
	for _, c := range greedy {
		if ask(c) == "127.0.0.1" {
			served++
		}
	}
	if served != len(greedy)-1 {
		t.Errorf("the greedy pod has %d connections left of %d", served, len(greedy))
	}
}

// TestReplacedConnectionIsNotCounted has a Listener close a connection that another Listener accepted.
func TestReplacedConnectionIsNotCounted(t *testing.T) {
	connections := NewConnections(0)
	connections.total = 3
	one, _ := listening(t, anyHolder, connections)
	defer one.Close()
	two, _ := listening(t, anyHolder, connections)
	defer two.Close()
	admit := func(l *Listener, source netip.Addr) {
		l.admit(&conn{TCPConn: new(net.TCPConn), listener: l, source: source}) // without a socket, but it can be closed
	}
	for range 3 {
		admit(one, podA)
	}
	admit(two, podB)
	if connections.Len() != 3 || connections.count[podA] != 2 || connections.count[podB] != 1 {
		t.Errorf("%d connections are counted, by source %v", connections.Len(), connections.count)
	}
}
