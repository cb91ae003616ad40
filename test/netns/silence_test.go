package netns

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

// shaped are bridges whose pods have a filter at their veth's ingress, which is reason to ask by a
// packet whether netfilter sees what passes it.
func shaped() []setup {
	var all []setup
	for _, s := range []setup{bridgeNFTables, bridged} {
		shape := testbed.Entry{"type": "bandwidth", "ingressRate": 800000000, "ingressBurst": 80000000, "egressRate": 800000000, "egressBurst": 80000000}
		s.chain = []testbed.Entry{shape, testbed.Kube2IAM(s.backend)}
		all = append(all, s)
	}
	return all
}

// wantNothing has a pod take its neighbour's address and ask for the neighbour's credentials from
// there, by the service and by dialling the proxy, while it tells everybody that the address is its
// own.
func (n *node) wantNothing(thief *testbed.Sandbox, wire *wire, victim netip.Addr) {
	n.t.Helper()
	n.address(thief, "add", victim.String()+"/32")
	claim := func() {
		wire.claim(victim, wire.mac, broadcast, victim)
		wire.claim(victim, wire.mac, broadcast, gateway)
	}
	during(claim, func() {
		n.wantSilenceOrRefusal(thief, victim)
		for range 3 {
			if got, err := n.dialProxy(thief, victim); len(got) > 0 {
				n.t.Errorf("%s dials the proxy from %s: %q, %v", thief.Name, victim, got, err)
			}
		}
	})
	n.address(thief, "del", victim.String()+"/32")
}

// dialProxy asks the proxy's own port for the role "app" from one of the pod's addresses, and is
// what it answered.
func (n *node) dialProxy(s *testbed.Sandbox, from netip.Addr) (got []byte, err error) {
	ctx, cancel := context.WithTimeout(n.t.Context(), time.Second)
	defer cancel()
	err = s.Netns.Do(func() error {
		dialer := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0))}
		conn, err := dialer.DialContext(ctx, "tcp", testbed.NodeIP.String()+":8181")
		if err != nil {
			return err
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(time.Second))
		io.WriteString(conn, "GET "+credentials+"app HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n")
		got, err = io.ReadAll(conn)
		return err
	})
	return got, err
}

// TestSwallowedProbe is a pod whose neighbour draws its packets to itself, by ARP in the gateway's
// name, while the agent asks whether netfilter sees them: that they do not come is no reason to
// give up anything that binds the pod's address to its port.
func TestSwallowedProbe(t *testing.T) {
	onThese(t, shaped(), func(t *testing.T, n *node) {
		n.proxy(impatient...)
		victim, thief := n.run("victim", "app"), n.run("thief", "other")
		n.wantOwn(victim, "app")
		wire, its := n.tap(thief), n.tap(victim)
		rules := n.rules()
		said := ""
		during(func() { wire.claim(gateway, wire.mac, its.mac, victim.IP) }, func() {
			n.eventually(func() bool {
				neighbours, err := victim.Netns.Run(t.Context(), n.ClientEnv(), "ip", "neigh", "show", gateway.String())
				return err == nil && strings.Contains(neighbours, wire.mac.String())
			})
			said = n.round()
		})
		// Where bridge-nf is on, netfilter sees frames whichever port they are bound for.
		if swallowed := strings.Contains(said, "did not see a packet"); swallowed != n.noBridgeNF {
			t.Errorf("the probe was swallowed: %v; the agent said\n%s", swallowed, said)
		}
		if got := n.record(victim, "eth0").Datapath; got != attachment.DatapathBridged {
			t.Errorf("recorded %s", got)
		}
		if diff := cmp.Diff(rules, n.rules()); diff != "" {
			t.Errorf("the agent changed rules (-before +after):\n%s", diff)
		}
		n.wantNothing(thief, wire, victim.IP)
		n.recover(victim, thief)
		n.wantOwn(victim, "app")
		n.wantOwn(thief, "other")
		n.wantOnlyTheNodeAsked()
	})
}

// TestSwallowedProbeOfAnADD has the neighbour do so while pods are added: each is refused, or
// protected as any.
func TestSwallowedProbeOfAnADD(t *testing.T) {
	onThese(t, shaped(), func(t *testing.T, n *node) {
		n.proxy(impatient...)
		thief := n.run("thief", "other")
		wire := n.tap(thief)
		var added []*testbed.Sandbox
		refused := 0
		poison := func() {
			next := thief.IP
			for range 12 { // whichever of them is the next pod's
				next = next.Next()
				wire.introduce(gateway, wire.mac, next)
			}
		}
		during(poison, func() {
			for i := range 8 {
				s := n.pending(fmt.Sprintf("pod%d", i), "app")
				if err := n.Add(t.Context(), s); err == nil {
					n.must(n.KubeAPI.SetStatus("default", s.Name, "Running", s.IP.String()))
					added = append(added, s)
				} else if refused++; !strings.Contains(err.Error(), "did not see a packet") {
					t.Errorf("%s: %v", s.Name, err)
				}
			}
		})
		// Where bridge-nf is on, netfilter sees frames whichever port they are bound for.
		if (refused > 0) != n.noBridgeNF {
			t.Errorf("%d of 8 ADDs were refused", refused)
		}
		for _, s := range added {
			if got := n.record(s, "eth0").Datapath; got != attachment.DatapathBridged {
				t.Errorf("%s is recorded as %s", s.Name, got)
			}
		}
		n.recover(slices.Concat(added, []*testbed.Sandbox{thief})...)
		for _, s := range added {
			n.wantNothing(thief, wire, s.IP)
			n.recover(s, thief)
			n.wantOwn(s, "app")
		}
		n.wantOnlyTheNodeAsked()
	})
}

// TestDroppedProbe is a policy that drops what a pod sends to the metadata service before netfilter
// sees it: it is not taken for one that takes packets past netfilter.
func TestDroppedProbe(t *testing.T) {
	for _, by := range []string{"tc", "tcx", "xdp"} {
		t.Run(by, func(t *testing.T) {
			onThese(t, few, func(t *testing.T, n *node) {
				n.proxy(impatient...)
				pod, thief := n.run("pod", "app"), n.run("thief", "other")
				n.wantOwn(pod, "app")
				rules, record := n.rules(), n.record(pod, "eth0")
				n.classify(n.hostLink(pod), by, dropping)
				if said := n.round(); !strings.Contains(said, "did not see a packet") {
					t.Errorf("the agent said\n%s", said)
				}
				if diff := cmp.Diff(record, n.record(pod, "eth0"), cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
					cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
					t.Errorf("the record changed (-before +after):\n%s", diff)
				}
				if diff := cmp.Diff(rules, n.rules()); diff != "" {
					t.Errorf("the agent changed rules (-before +after):\n%s", diff)
				}
				if _, err := n.dialProxy(thief, thief.IP); err != nil && !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("the proxy cannot be dialled, and nothing is shown: %v", err)
				}
				if n.primary == "bridge" {
					n.wantNothing(thief, n.tap(thief), pod.IP)
				}

				// The same program before the ADD: it is refused.
				chain := n.SetChain()
				late := n.pending("late", "app")
				n.must(n.Add(t.Context(), late))
				n.classify(n.hostLink(late), by, dropping)
				n.SetChain(chain...)
				if err := n.AddAgain(t.Context(), late, late.Result); err == nil || !strings.Contains(err.Error(), "did not see a packet") {
					t.Errorf("ADD behind a filter that drops: %v", err)
				}
				n.wantNoTrace(late)
				n.wantOnlyTheNodeAsked()
			})
		})
	}
}
