package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/handover"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/imds"
)

// limitedProxy is the part of a proxy that accepts connections. Its sockets are the app port, the
// metrics port and a former app port.
type limitedProxy struct {
	*testing.T
	client    *fake.Clientset
	parts     *components
	sockets   []*handover.Listener
	listeners []*imds.Listener
}

func newLimitedProxy(t *testing.T, podRequests float64) *limitedProxy {
	t.Helper()
	l := &limitedProxy{T: t, client: fake.NewClientset()}
	p, _, end := startComponentsIn(t, fakeAPI{l.client})
	t.Cleanup(end)
	l.parts = p
	for range 3 {
		socket, err := handover.Socket{Address: "127.0.0.1:0"}.Listen(t.Context(), false)
		if err != nil {
			t.Fatal(err)
		}
		l.sockets = append(l.sockets, socket)
	}
	every := func(netip.Addr, netip.AddrPort) bool { return true }
	named := map[string]*handover.Listener{podPrefix + "0": l.sockets[0], metricsPrefix + "1": l.sockets[1], podPrefix + "2": l.sockets[2]}
	l.listeners = podListeners(named, every, &options{podRequests: podRequests}, p, slog.New(slog.DiscardHandler))
	for _, app := range l.listeners {
		s := &http.Server{ConnContext: imds.ConnContext, Handler: http.NotFoundHandler()}
		go s.Serve(app)
		t.Cleanup(func() { s.Close() })
	}
	t.Cleanup(func() { l.sockets[1].Close() })
	return l
}

// dial connects to a socket. It returns nil if the proxy resets the connection before connect
// returns.
func (l *limitedProxy) dial(socket int) net.Conn {
	c, err := net.Dial("tcp", l.sockets[socket].Addr().String())
	if err != nil {
		return nil
	}
	l.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(20 * time.Second))
	return c
}

// answered makes a request over a new connection and reports whether it is answered.
func (l *limitedProxy) answered(socket int) bool {
	c := l.dial(socket)
	if c == nil {
		return false
	}
	defer c.Close()
	io.WriteString(c, "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
	_, err := http.ReadResponse(bufio.NewReader(c), nil)
	return err == nil
}

// open returns how many connections the listeners have.
func (l *limitedProxy) open() int { return l.listeners[0].Len() }

// refused reports whether the metrics show n refused connections.
func (l *limitedProxy) refused(n int) bool {
	_, body := get(l.parts.metrics.Handler(), "/metrics")
	return strings.Contains(body, fmt.Sprintf("\nkube2iam_http_connections_refused_total %d\n", n))
}

// TestPodSocketsShareLimits connects to the app port and to a former one: a pod may have 256
// connections and make 1,000 requests at once at both together.
func TestPodSocketsShareLimits(t *testing.T) {
	t.Run("connections", func(t *testing.T) {
		l := newLimitedProxy(t, 0)
		for range 200 {
			l.dial(0)
			l.dial(2)
		}
		eventually(t, "400 connections are accepted or refused", func() bool { return l.open() == 256 && l.refused(400-256) })
	})
	t.Run("requests", func(t *testing.T) {
		l := newLimitedProxy(t, 1e-9)
		answered := 0
		for i := range 1100 {
			if l.answered(2 * (i % 2)) {
				answered++
			}
		}
		if answered != 1000 || !l.refused(100) {
			t.Errorf("%d requests of 1,100 were answered, want 1,000 and 100 refused connections", answered)
		}
	})
}

// TestConnectionIsResetWhenAddressIsReused gives a pod's address to another pod while its
// connection is idle. No plugin destroys the socket here: the proxy resets the connection.
func TestConnectionIsResetWhenAddressIsReused(t *testing.T) {
	l := newLimitedProxy(t, 0)
	address := netip.MustParseAddr("127.0.0.1")
	pods := l.client.CoreV1().Pods("ns")
	create := func(name string) {
		t.Helper()
		if _, err := pods.Create(t.Context(), runningPod(name, "", address.String()), metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		eventually(t, name+" has the address", func() bool { return l.parts.broker.Identity(address) == "uid-"+name })
	}
	create("a")
	c := l.dial(0)
	io.WriteString(c, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
	if _, err := http.ReadResponse(bufio.NewReader(c), nil); err != nil {
		t.Fatal(err)
	}
	if err := pods.Delete(t.Context(), "a", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	create("b")
	if _, err := io.Copy(io.Discard, c); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("%v, want a reset", err)
	}
	if !l.refused(1) {
		t.Error("the reset is not counted")
	}
}
