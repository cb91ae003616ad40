package netns

import (
	"context"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

// TestForgedSource is a pod with NET_ADMIN that gives itself its neighbour's address and asks from there. Its packets enter
// by its own port or veth, where that address is redirected nowhere.
func TestForgedSource(t *testing.T) {
	onEach(t, func(t *testing.T, n *node) {
		n.proxy(impatient...)
		victim, forger := n.run("victim", "app"), n.run("forger", "other")
		n.wantOwn(victim, "app")
		_, err := forger.Netns.Run(t.Context(), n.ClientEnv(), "ip", "address", "add", victim.IP.String()+"/32", "dev", "eth0")
		n.must(err)
		n.wantSilence(forger, victim.IP)
		// An address that is nobody's.
		stranger := netip.MustParseAddr("10.201.0.200")
		_, err = forger.Netns.Run(t.Context(), n.ClientEnv(), "ip", "address", "add", stranger.String()+"/32", "dev", "eth0")
		n.must(err)
		n.wantSilence(forger, stranger)
		if asked := n.IMDS.Requests(); len(asked) > 0 {
			for _, r := range asked {
				if r.Source != testbed.NodeIP {
					t.Errorf("%s reached the real metadata service: %s", r.Source, r.URI)
				}
			}
		}
		n.wantOwn(forger, "other")
		if n.primary != "bridge" {
			// On a bridge the forger answers ARP for its neighbour's address by now: what is sent to the neighbour is dropped at
			// the forger's port (TestStolenAddress), which is silence for the neighbour.
			n.wantOwn(victim, "app")
		}
	})
}

// wantSilence dials the metadata service from an address of the pod and wants no connection.
func (n *node) wantSilence(s *testbed.Sandbox, from netip.Addr) {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(n.t.Context(), time.Second)
	defer cancel()
	err := s.Netns.Do(func() error {
		dialer := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0))}
		conn, err := dialer.DialContext(ctx, "tcp", testbed.MetadataAddr)
		if err == nil {
			conn.Close()
		}
		return err
	})
	if err == nil {
		n.t.Errorf("%s has a connection from %s", s.Name, from)
	}
}
