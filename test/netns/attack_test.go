package netns

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

var (
	service = netip.MustParseAddr("169.254.169.254")
	gateway = netip.MustParseAddr("10.201.0.1")

	bridges = []setup{bridgeNFTables, bridged}

	// Each is attacked by IPv4, and by IPv6 where pods have that, too.
	attacked = append(slices.Clone(bridges), dual(bridgeNFTables), dual(bridged))
)

func dual(s setup) setup {
	s.ipv6 = true
	return s
}

// front is a pod's address and the metadata service's of the same family.
type front struct {
	pod, gateway, service netip.Addr
	url                   string
}

// fronts returns a front for each address of the pod.
func fronts(s *testbed.Sandbox) []front {
	var all []front
	for _, given := range s.Result.IPs {
		ip, _ := netip.AddrFromSlice(given.Address.IP)
		f := front{ip.Unmap(), gateway, service, metadata}
		if f.pod.Is6() {
			f = front{f.pod, netip.MustParseAddr("fd00:201::1"), service6, "http://" + testbed.MetadataAddr6}
		}
		all = append(all, f)
	}
	return all
}

// during repeats an attack while f runs: it overwrites what a neighbour or the bridge learns in
// between.
func during(attack func(), f func()) {
	stop := make(chan struct{})
	var attacking sync.WaitGroup
	attacking.Go(func() {
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		for {
			attack()
			select {
			case <-stop:
				return
			case <-tick.C:
			}
		}
	})
	f()
	close(stop)
	attacking.Wait()
}

// try makes a few requests of one second, as an SDK does, and returns the answers.
func (n *node) try(s *testbed.Sandbox, url string) []answer {
	n.t.Helper()
	var answers []answer
	for range 3 {
		ctx, cancel := context.WithTimeout(n.t.Context(), time.Second)
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		n.must(err)
		resp, err := s.Netns.HTTP().Do(req)
		if err != nil {
			answers = append(answers, answer{err: err})
		} else {
			body, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			answers = append(answers, answer{status: resp.StatusCode, body: string(body), err: err})
		}
		cancel()
	}
	return answers
}

// recover removes what an attack left in the neighbour tables, as time does.
func (n *node) recover(pods ...*testbed.Sandbox) {
	n.t.Helper()
	for _, family := range []string{"-4", "-6"} {
		n.onNode("ip " + family + " neigh flush dev cni0")
		for _, s := range pods {
			_, err := s.Netns.Run(n.t.Context(), n.ClientEnv(), "ip", family, "neigh", "flush", "dev", "eth0")
			n.must(err)
		}
	}
}

// TestStolenAddress: a pod claims its neighbour's address by ARP or NDP, and then its MAC
// address. The node drops what the proxy sends to the neighbour at the thief's port.
func TestStolenAddress(t *testing.T) {
	onThese(t, attacked, func(t *testing.T, n *node) {
		n.proxy(impatient...)
		victim, thief := n.run("victim", "app"), n.run("thief", "other")
		n.wantOwn(victim, "app")
		wire, its := n.tap(thief), n.tap(victim)
		for _, f := range fronts(victim) {
			steal := map[string]func(){
				"IP address": func() {
					wire.claim(f.pod, wire.mac, broadcast, f.pod)
					wire.claim(f.pod, wire.mac, broadcast, f.gateway)
				},
				"MAC address": func() { wire.from(its.mac) },
			}
			for what, attack := range steal {
				during(attack, func() { n.try(victim, f.url+credentials+"app") })
				if data, segments := wire.payloads(f.service, f.pod); segments > 0 {
					t.Errorf("the thief of the %s %s saw %d segments of the neighbour's answers: %q", what, f.pod, segments, data)
				}
				n.recover(victim)
				its.from(its.mac)
				n.wantOwnAt(victim, f.url, "app")
				n.wantOwn(thief, "other")
			}
			n.wantOnlyTheNodeAsked()
		}

		// The control: without the rule that binds answers to ports, the thief has the neighbour's
		// credentials.
		n.onNode("nft flush chain bridge kube2iam-cni output")
		for _, f := range fronts(victim) {
			n.eventually(func() bool {
				during(func() { wire.from(its.mac) }, func() { n.try(victim, f.url+credentials+"app") })
				data, _ := wire.payloads(f.service, f.pod)
				return len(data) > 0
			})
		}
	})
}

// TestFalseGateway: a pod claims the gateway's address by ARP or NDP and answers as the metadata
// service. It receives nothing of its neighbour's, and its answers do not arrive.
func TestFalseGateway(t *testing.T) {
	onThese(t, attacked, func(t *testing.T, n *node) {
		n.proxy(impatient...)
		victim, liar := n.run("victim", "app"), n.run("liar", "other")
		n.wantOwn(victim, "app")
		n.serveLies(liar)
		wire, its := n.tap(liar), n.tap(victim)
		// lied tells whether the neighbour believes the liar in a few requests.
		lied := func(f front) (believed bool) {
			during(func() { wire.claim(f.gateway, wire.mac, its.mac, f.pod) }, func() {
				for _, got := range n.try(victim, f.url+credentials) {
					believed = believed || strings.Contains(got.body, "lie")
				}
			})
			return believed
		}
		for _, f := range fronts(victim) {
			if lied(f) {
				t.Errorf("the neighbour believes a lie of %s", f.service)
			}
			if data, segments := wire.payloads(f.pod, f.service); segments > 0 {
				t.Errorf("the liar saw %d segments of the neighbour's requests: %q", segments, data)
			}
			n.recover(victim)
			n.wantOwnAt(victim, f.url, "app")

			// Not by ARP, but by route: the liar sends what it has of its neighbour's address to
			// the real gateway.
			n.address(liar, "add", netip.PrefixFrom(f.pod, f.pod.BitLen()).String())
			n.wantSilenceOrRefusal(liar, f.pod)
			n.wantOnlyTheNodeAsked()
			n.address(liar, "del", netip.PrefixFrom(f.pod, f.pod.BitLen()).String())
			n.recover(victim, liar)
		}

		// That the attack is one: where bridge-nf does not bring bridged frames before the
		// redirection, the neighbour listens to lies without the chain that no frame of the service
		// passes from port to port.
		if !n.noBridgeNF {
			return
		}
		n.onNode("nft flush chain bridge kube2iam-cni forward")
		n.onNode("nft flush chain bridge kube2iam-cni guard")
		for _, f := range fronts(victim) {
			n.eventually(func() bool { return lied(f) })
		}
	})
}

// serveLies answers every request that reaches the pod for one of the metadata service's addresses.
func (n *node) serveLies(s *testbed.Sandbox) {
	n.t.Helper()
	for _, f := range fronts(s) {
		_, err := s.Netns.Run(n.t.Context(), n.ClientEnv(), "ip", "address", "add", netip.PrefixFrom(f.service, f.service.BitLen()).String(), "dev", "lo", "nodad")
		n.must(err)
		listener, err := s.Netns.Listen("tcp", netip.AddrPortFrom(f.service, 80).String())
		n.must(err)
		server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "lie") })}
		go server.Serve(listener)
		n.t.Cleanup(func() { server.Close() })
	}
}

// TestClaimsInHeaders: a header that names another pod's address or role changes nothing.
func TestClaimsInHeaders(t *testing.T) {
	onThese(t, []setup{bridgeIPTables, bridged, routedIPTables}, func(t *testing.T, n *node) {
		n.proxy(impatient...)
		victim, liar := n.run("victim", "app"), n.run("liar", "other")
		n.wantOwn(victim, "app")
		for _, claim := range [][]string{
			{"X-Forwarded-For", victim.IP.String()},
			{"Forwarded", "for=" + victim.IP.String()},
			{"X-Real-IP", victim.IP.String()},
			{"Host", victim.IP.String()},
			{"Host", "127.0.0.1"},
		} {
			if got := n.get(liar, credentials, claim...); got.status != http.StatusOK || got.body != "other" {
				t.Errorf("%v: %s, want its own role", claim, got)
			}
			if got := n.get(liar, credentials+"app", claim...); got.status != http.StatusNotFound {
				t.Errorf("%v: %s, want 404", claim, got)
			}
			n.wantSession(liar, "other", n.get(liar, credentials+"other", claim...))
		}
	})
}

// TestForgedSourceOnTheHost: a process on the node dials the proxy from a pod's address. The
// request may arrive; the answer goes to the pod, which has no such connection.
func TestForgedSourceOnTheHost(t *testing.T) {
	onThese(t, []setup{bridgeIPTables, bridged, routedIPTables}, func(t *testing.T, n *node) {
		n.proxy(impatient...)
		victim := n.run("victim", "app")
		n.wantOwn(victim, "app")
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		err := n.Node.Do(func() error {
			dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: victim.IP.AsSlice()}, Control: freeBind}
			conn, err := dialer.DialContext(ctx, "tcp", testbed.NodeIP.String()+":8181")
			if err == nil {
				conn.Close()
			}
			return err
		})
		if err == nil {
			t.Error("a connection from the pod's address came about on the host")
		}
		n.wantOwn(victim, "app")
	})
}

// freeBind lets a socket use an address that the machine does not have (ip(7), IP_FREEBIND,
// IP_TRANSPARENT).
func freeBind(_, _ string, c syscall.RawConn) error {
	var failed error
	err := c.Control(func(fd uintptr) {
		if failed = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_FREEBIND, 1); failed == nil {
			failed = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TRANSPARENT, 1)
		}
	})
	if err == nil {
		err = failed
	}
	return err
}
