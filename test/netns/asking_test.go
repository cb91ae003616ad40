package netns

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"regexp"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

// deadline bounds what a test waits for an answer that may never come.
func deadline() time.Time { return time.Now().Add(10 * time.Second) }

// getAt is get from another service.
func (n *node) getAt(s *testbed.Sandbox, service, path string) answer {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(n.t.Context(), 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, service+path, nil)
	n.must(err)
	resp, err := s.Netns.HTTP().Do(req)
	if err != nil {
		return answer{err: err}
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return answer{status: resp.StatusCode, body: string(body), err: err}
}

// wantOwnAt is wantOwn from another service.
func (n *node) wantOwnAt(s *testbed.Sandbox, service, role string) {
	n.t.Helper()
	if got := n.getAt(s, service, credentials); got.status != http.StatusOK || got.body != role {
		n.t.Errorf("%s lists its roles at %s: %s, want %s", s.Name, service, got, role)
		return
	}
	n.wantSession(s, role, n.getAt(s, service, credentials+role))
}

// address changes the addresses of the pod's eth0, as a pod with NET_ADMIN may.
func (n *node) address(s *testbed.Sandbox, change, prefix string) {
	n.t.Helper()
	args := []string{"address", change, prefix, "dev", "eth0"}
	if netip.MustParsePrefix(prefix).Addr().Is6() {
		args = append(args, "nodad")
	}
	_, err := s.Netns.Run(n.t.Context(), n.ClientEnv(), "ip", args...)
	n.must(err)
}

// wantSilenceOrRefusal dials the metadata service from one of the pod's addresses and wants no
// answer. A client without an answer proves little: the answer to a forged address goes to its
// owner. So the node must not track the connection either, which it does as soon as a packet is
// delivered or forwarded.
func (n *node) wantSilenceOrRefusal(s *testbed.Sandbox, from netip.Addr) {
	n.t.Helper()
	source, err := n.dialService(s, from)
	if err == nil {
		n.t.Errorf("%s has a connection from %s", s.Name, from)
	} else if !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, syscall.EHOSTUNREACH) && !isTimeout(err) {
		n.t.Errorf("%s dials from %s: %v", s.Name, from, err)
	}
	if to, ok := n.landing(source); ok {
		n.t.Errorf("a packet of %s from %s was let through to %s", s.Name, from, to)
	}
}

// dialled counts the connections of dialService: each has a source port of its own.
var dialled atomic.Uint32

// dialService connects to the metadata service from one of the pod's addresses for a moment, and
// returns the address and port that it dialled from.
func (n *node) dialService(s *testbed.Sandbox, from netip.Addr) (source netip.AddrPort, err error) {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(n.t.Context(), time.Second)
	defer cancel()
	source = netip.AddrPortFrom(from, uint16(10000+dialled.Add(1)%20000)) // below the ephemeral ports
	err = s.Netns.Do(func() error {
		dialer := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(source)}
		conn, err := dialer.DialContext(ctx, "tcp", serviceOf(from).String())
		if err == nil {
			conn.Close()
		}
		return err
	})
	return source, err
}

// serviceOf returns the metadata service's address of the same family.
func serviceOf(ip netip.Addr) netip.AddrPort {
	if ip.Is6() {
		return netip.MustParseAddrPort(testbed.MetadataAddr6)
	}
	return netip.MustParseAddrPort(testbed.MetadataAddr)
}

// landing returns where the node sent a connection that was opened to the metadata service from
// source: to the proxy, to the service, or to whatever another program's rules say. It is false
// where no packet of it was delivered or forwarded: a connection is tracked from then on, and not
// before (nf_conntrack_confirm).
func (n *node) landing(source netip.AddrPort) (to netip.AddrPort, ok bool) {
	n.t.Helper()
	service := serviceOf(source.Addr())
	out, err := n.Node.Run(n.t.Context(), n.ClientEnv(), "conntrack", "-G", "-p", "tcp", "--orig-src", source.Addr().String(),
		"--sport", fmt.Sprint(source.Port()), "--orig-dst", service.Addr().String(), "--dport", fmt.Sprint(service.Port()))
	if err != nil && strings.Contains(err.Error(), "conntrack doesn't exist") {
		return netip.AddrPort{}, false
	}
	n.must(err)
	replies := replySource.FindAllStringSubmatch(out, -1)
	if len(replies) != 2 {
		n.t.Fatalf("conntrack -G: %q", out)
	}
	return netip.MustParseAddrPort(net.JoinHostPort(replies[1][1], replies[1][2])), true
}

// replySource matches the source of a connection's packets in what conntrack prints, those of the
// original direction first.
var replySource = regexp.MustCompile(`src=(\S+) dst=\S+ sport=(\d+)`)

func isTimeout(err error) bool {
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout()
}

// wantOnlyTheNodeAsked wants every request at the real metadata service to be the node's.
func (n *node) wantOnlyTheNodeAsked() {
	n.t.Helper()
	asked := n.IMDS.Requests()
	if n.IMDS6 != nil {
		asked = append(asked, n.IMDS6.Requests()...)
	}
	for _, r := range asked {
		if r.Source != testbed.NodeIP && r.Source != testbed.NodeIP6 {
			n.t.Errorf("%s reached the real metadata service: %s", r.Source, r.URI)
		}
	}
}
