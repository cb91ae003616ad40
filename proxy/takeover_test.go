package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/credentials"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/handover"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/unixsocket"
	"github.com/kube2iam-cni/kube2iam-cni/test/testrecord"
)

// served starts the handover of a proxy with the given number of sockets and returns their ports:
// the app port, the metrics port and former app ports.
func served(t *testing.T, path string, sockets int, asked *atomic.Int64) (ports []uint16) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	s := handover.New(handover.Config{Path: path, Log: slog.New(slog.DiscardHandler), Export: func() ([]byte, error) {
		asked.Add(1)
		return []byte("[]"), nil
	}})
	listeners := make(map[string]*handover.Listener)
	for i := range sockets {
		l, err := handover.Socket{Address: ":0"}.Listen(ctx, false)
		if err != nil {
			t.Fatal(err)
		}
		name := podSocket(portOf(l)).Name
		if i == 1 {
			name = metricsSocket(&options{metricsPort: portOf(l)}).Name
		}
		listeners[name] = l
		ports = append(ports, portOf(l))
	}
	var done sync.WaitGroup
	done.Go(func() {
		if err := s.Serve(ctx, listeners); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		cancel()
		done.Wait()
		for _, l := range listeners {
			l.Close()
		}
	})
	eventually(t, "its socket", func() bool { return !unixsocket.IsAbandoned(path) })
	return ports
}

// TestSuccessorWithOtherMetricsAddress changes --metrics-address and keeps the port. The
// predecessor has its socket open until it ends.
func TestSuccessorWithOtherMetricsAddress(t *testing.T) {
	every, one, two := netip.Addr{}, netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("127.0.0.2")
	for name, tt := range map[string]struct{ had, wants netip.Addr }{
		"every address":          {every, every},
		"one address":            {one, one},
		"every address to one":   {every, one},
		"one address to every":   {one, every},
		"one address to another": {one, two},
		"IPv4 to IPv6":           {one, netip.MustParseAddr("::1")},
		"IPv6 to every address":  {netip.MustParseAddr("::1"), every},
	} {
		t.Run(name, func(t *testing.T) {
			dir := shortDir(t)
			log := slog.New(slog.DiscardHandler)
			p := &components{cache: credentials.New(new(countingSTS), credentials.Config{Log: log})}
			p.wasReady.Store(true)
			o := &options{stateDir: dir, appPort: free(t), metricsPort: free(t), metricsAddress: tt.had}
			first := newTakeover(o, p, log)
			had, err := first.Listen(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(context.Background())
			var serving sync.WaitGroup
			serving.Go(func() { first.Serve(ctx, had) })
			defer func() {
				cancel()
				serving.Wait()
				for _, l := range had {
					l.Close()
				}
			}()
			eventually(t, "handover socket", func() bool {
				found, err := handover.Dial(t.Context(), first.Path)
				return err == nil && found != nil && found.Close() == nil
			})

			o2 := *o
			o2.metricsAddress = tt.wants
			second := newTakeover(&o2, p, log)
			defer second.Close()
			second.Begin(t.Context())
			sockets, err := second.Listen(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			for _, l := range sockets {
				defer l.Close()
			}
			metrics := sockets[metricsSocket(&o2).Name]
			got := metrics.Addr().(*net.TCPAddr).AddrPort()
			isWanted := got.Addr().Unmap() == tt.wants || got.Addr().IsUnspecified() && !tt.wants.IsValid()
			if !isWanted || got.Port() != o.metricsPort {
				t.Errorf("metrics are served at %v, want %v, port %d", got, tt.wants, o.metricsPort)
			}
			serving.Go(func() { second.Serve(ctx, sockets) })
			eventually(t, "handover", func() bool { return isHandedOver(first) })
			to := tt.wants
			if !to.IsValid() {
				to = netip.MustParseAddr("127.0.0.3")
			}
			c, err := net.Dial("tcp", netip.AddrPortFrom(to, o.metricsPort).String())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			metrics.SetDeadline(time.Now().Add(10 * time.Second))
			if accepted, err := metrics.TCPListener.Accept(); err != nil {
				t.Errorf("the new proxy accepts nothing there: %v", err)
			} else {
				accepted.Close()
			}
			// A third socket cannot have the port.
			if l, err := (handover.Socket{Address: net.JoinHostPort(to.String(), fmt.Sprint(o.metricsPort))}).Listen(t.Context(), false); err == nil {
				l.Close()
				t.Error("another socket got the port")
			}
		})
	}
}

// TestForeignMetricsAddress: an address that the node does not have is an error at once.
func TestForeignMetricsAddress(t *testing.T) {
	o := &options{stateDir: t.TempDir(), appPort: free(t), metricsPort: free(t), metricsAddress: netip.MustParseAddr("192.0.2.1")}
	if _, err := newTakeover(o, &components{cache: credentials.New(nil, credentials.Config{Log: slog.New(slog.DiscardHandler)})}, slog.New(slog.DiscardHandler)).Listen(t.Context()); !errors.Is(err, unix.EADDRNOTAVAIL) || !strings.Contains(err.Error(), "192.0.2.1") {
		t.Errorf("%v", err)
	}
}

func portOf(l *handover.Listener) uint16 { return l.Addr().(*net.TCPAddr).AddrPort().Port() }

// free returns an unused port.
func free(t *testing.T) uint16 {
	t.Helper()
	l, err := handover.Socket{Address: ":0"}.Listen(t.Context(), false)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return portOf(l)
}

// TestSuccessorServesFormerPorts changes ports: pods are still redirected to the former app port.
func TestSuccessorServesFormerPorts(t *testing.T) {
	for name, tt := range map[string]struct {
		sockets int
		ports   func(had []uint16, free uint16) (app, admin uint16)
		want    func(had []uint16, free uint16) []uint16
	}{
		"no port":                       {2, func(h []uint16, _ uint16) (uint16, uint16) { return h[0], h[1] }, func(h []uint16, _ uint16) []uint16 { return h }},
		"metrics port":                  {2, func(h []uint16, f uint16) (uint16, uint16) { return h[0], f }, func(h []uint16, f uint16) []uint16 { return []uint16{h[0], f} }},
		"app port":                      {2, func(h []uint16, f uint16) (uint16, uint16) { return f, h[1] }, func(h []uint16, f uint16) []uint16 { return []uint16{f, h[1], h[0]} }},
		"app port, for the second time": {3, func(h []uint16, f uint16) (uint16, uint16) { return f, h[1] }, func(h []uint16, f uint16) []uint16 { return []uint16{f, h[1], h[0], h[2]} }},
		"app port, and back":            {3, func(h []uint16, _ uint16) (uint16, uint16) { return h[2], h[1] }, func(h []uint16, _ uint16) []uint16 { return []uint16{h[2], h[1], h[0]} }},
		"more former ports than served": {7, func(h []uint16, _ uint16) (uint16, uint16) { return h[0], h[1] }, func(h []uint16, _ uint16) []uint16 { return h[:6] }},
	} {
		t.Run(name, func(t *testing.T) {
			dir := shortDir(t)
			path := handoverSocket(dir)
			var asked atomic.Int64
			had := served(t, path, tt.sockets, &asked)
			other := free(t)
			p := &components{cache: credentials.New(new(countingSTS), credentials.Config{Log: slog.New(slog.DiscardHandler)})}
			p.wasReady.Store(true)
			o := &options{stateDir: dir}
			o.appPort, o.metricsPort = tt.ports(had, other)
			successor := newTakeover(o, p, slog.New(slog.DiscardHandler))
			defer successor.Close()
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			successor.Begin(ctx)
			sockets, err := successor.Listen(ctx)
			if err != nil {
				t.Fatal(err)
			}
			if asked.Load() != 2 {
				t.Errorf("the state was requested %d times, want at the start and just before the sockets", asked.Load())
			}
			var got []uint16
			for _, l := range sockets {
				got = append(got, portOf(l))
				defer l.Close()
				c, err := new(net.Dialer).DialContext(ctx, "tcp", net.JoinHostPort("127.0.0.1", fmt.Sprint(portOf(l))))
				if err != nil {
					t.Errorf("port %d: %v", portOf(l), err)
					continue
				}
				c.Close()
			}
			want := tt.want(had, other)
			if tt.sockets == 7 { // any four former ports
				slices.Sort(got)
				for _, p := range had[:2] {
					if !slices.Contains(got, p) {
						t.Errorf("port %d is not served", p)
					}
				}
				want = got
				if len(got) != 6 {
					want = had[:6]
				}
			}
			slices.Sort(got)
			slices.Sort(want)
			if !slices.Equal(got, want) {
				t.Errorf("serves %v, want %v of %v and %d", got, want, had, other)
			}
		})
	}
}

// TestFormerPortAfterCrash: without a predecessor, the records of pods name the former port.
func TestFormerPortAfterCrash(t *testing.T) {
	o := &options{stateDir: t.TempDir(), appPort: free(t), metricsPort: free(t)}
	former := free(t)
	for i, p := range []uint16{o.appPort, former, former} {
		ip := netip.AddrFrom4([4]byte{10, 0, 0, byte(i + 1)})
		record := testrecord.New(fmt.Sprint("c", i), attachment.Pod{}, ip)
		record.Redirects[0].Proxy = netip.AddrPortFrom(netip.MustParseAddr("10.0.0.254"), p)
		if err := attachment.In(o.stateDir).Put(record); err != nil {
			t.Fatal(err)
		}
	}
	sockets, err := newTakeover(o, &components{cache: credentials.New(nil, credentials.Config{Log: slog.New(slog.DiscardHandler)})}, slog.New(slog.DiscardHandler)).Listen(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var got []uint16
	for _, l := range sockets {
		defer l.Close()
		got = append(got, portOf(l))
	}
	want := []uint16{o.appPort, o.metricsPort, former}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("serves %v, want %v", got, want)
	}
}
