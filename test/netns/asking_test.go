package netns

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"syscall"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

// deadline bounds what a test waits for an answer that may never come.
func deadline() time.Time { return time.Now().Add(10 * time.Second) }

// getAt is get from a service of the caller's choice.
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

// wantOwnAt is wantOwn from a service of the caller's choice.
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

// wantSilenceOrRefusal dials the metadata service from one of the pod's addresses, and wants no answer: neither the proxy's
// nor the service's.
func (n *node) wantSilenceOrRefusal(s *testbed.Sandbox, from netip.Addr) {
	n.t.Helper()
	service := testbed.MetadataAddr
	if from.Is6() {
		service = testbed.MetadataAddr6
	}
	ctx, cancel := context.WithTimeout(n.t.Context(), time.Second)
	defer cancel()
	var conn net.Conn
	err := s.Netns.Do(func() (err error) {
		dialer := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0))}
		conn, err = dialer.DialContext(ctx, "tcp", service)
		return err
	})
	if err == nil {
		conn.Close()
		n.t.Errorf("%s has a connection from %s", s.Name, from)
		return
	}
	if !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, syscall.EHOSTUNREACH) && !isTimeout(err) {
		n.t.Errorf("%s dials from %s: %v", s.Name, from, err)
	}
}

func isTimeout(err error) bool {
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout()
}

// wantOnlyTheNodeAsked wants that nobody but the node has got through to the real metadata service, for whatever it was.
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
