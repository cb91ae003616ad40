package agent

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// tracking has the kernel track what the host forwards and sends.
const tracking = `table inet tracking {
	chain forward { type filter hook forward priority 0; policy accept; ct state new accept; }
	chain output { type filter hook output priority 0; policy accept; ct state new accept; }
	chain redirected { type nat hook prerouting priority -100; policy accept; ip saddr 10.1.0.6 tcp dport 80 dnat ip to 192.168.7.2:8181; }
}`

// newTrackingNetwork is a pod with two addresses, of which one is redirected, and a metadata service behind the host.
func newTrackingNetwork(t *testing.T) (n *network, pod, service netns.NsHandle) {
	n = newNetwork(t)
	pod, service = n.namespace(), n.namespace()
	n.run(`ip link add veth0 type veth peer name eth0 netns ` + path(pod) + `
		ip link add uplink type veth peer name far netns ` + path(service) + `
		ip addr add 10.1.0.1/24 dev veth0
		ip addr add fd00:1::1/64 dev veth0 nodad
		ip addr add 192.168.7.2/24 dev uplink
		ip addr add fd00:7::2/64 dev uplink nodad
		ip link set veth0 up
		ip link set uplink up`)
	for _, sysctl := range []string{"net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"} {
		n.must(os.WriteFile("/proc/sys/"+sysctl, []byte("1"), 0o644))
	}
	n.in(pod, func() {
		n.run(`ip addr add 10.1.0.5/24 dev eth0
			ip addr add 10.1.0.6/24 dev eth0
			ip addr add fd00:1::5/64 dev eth0 nodad
			ip link set eth0 up
			ip route add default via 10.1.0.1
			ip route add default via fd00:1::1`)
	})
	n.in(service, func() {
		n.run(`ip addr add 192.168.7.1/24 dev far
			ip addr add fd00:7::1/64 dev far nodad
			ip addr add 169.254.169.254/32 dev lo
			ip addr add 169.254.169.253/32 dev lo
			ip addr add fd00:ec2::254/128 dev lo nodad
			ip link set far up
			ip route add default via 192.168.7.2
			ip route add default via fd00:7::2`)
	})
	n.run(`ip route add default via 192.168.7.1
		ip route add default via fd00:7::1`)
	return n, pod, service
}

// serve holds every connection to an address open.
func (n *network) serve(ns netns.NsHandle, address string) {
	n.Helper()
	var l net.Listener
	n.in(ns, func() {
		var err error
		l, err = net.Listen("tcp", address)
		n.must(err)
	})
	n.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			n.Cleanup(func() { c.Close() })
		}
	}()
}

// connect makes a connection that lasts as long as the test, and returns how it is tracked.
func (n *network) connect(ns netns.NsHandle, source, address string) string {
	n.Helper()
	n.in(ns, func() {
		ctx, cancel := context.WithTimeout(n.Context(), 10*time.Second)
		defer cancel()
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(source)}, FallbackDelay: -1}
		c, err := d.DialContext(ctx, "tcp", address)
		n.must(err)
		n.Cleanup(func() { c.Close() })
	})
	return fmt.Sprintf("%s to %s", source, address)
}

// tracked are the connections that the host's kernel has, in order.
func (n *network) tracked() []string {
	n.Helper()
	var all []string
	for _, family := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
		flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, family)
		n.must(err)
		for _, f := range flows {
			if f.Forward.Protocol == unix.IPPROTO_TCP {
				all = append(all, fmt.Sprintf("%s to %s", f.Forward.SrcIP, net.JoinHostPort(f.Forward.DstIP.String(), fmt.Sprint(f.Forward.DstPort))))
			}
		}
	}
	slices.Sort(all)
	return all
}

// TestCutConnections ends a pod's connections to the service that go to the service itself, and no other.
func TestCutConnections(t *testing.T) {
	n, pod, service := newTrackingNetwork(t)
	n.nft(tracking)
	for _, address := range []string{"169.254.169.254:80", "169.254.169.254:81", "169.254.169.253:80", "[fd00:ec2::254]:80", "[fd00:ec2::254]:81"} {
		n.serve(service, address)
	}
	n.serve(n.host, "192.168.7.2:8181")
	var stay []string
	direct4 := n.connect(pod, "10.1.0.5", "169.254.169.254:80")
	direct6 := n.connect(pod, "fd00:1::5", "[fd00:ec2::254]:80")
	stay = append(stay,
		n.connect(n.host, "192.168.7.2", "169.254.169.254:80"), // the host's own
		n.connect(n.host, "10.1.0.1", "169.254.169.254:80"),    // the host's own, by the address that is the pod's gateway
		n.connect(n.host, "fd00:7::2", "[fd00:ec2::254]:80"),
		n.connect(pod, "10.1.0.5", "169.254.169.253:80"), // another destination
		n.connect(pod, "10.1.0.5", "169.254.169.254:81"), // another port
		n.connect(pod, "fd00:1::5", "[fd00:ec2::254]:81"),
		n.connect(pod, "10.1.0.6", "169.254.169.254:80"), // redirected
	)
	want := func(when string, all ...string) {
		t.Helper()
		slices.Sort(all)
		if diff := cmp.Diff(all, n.tracked()); diff != "" {
			t.Errorf("%s:\n%s", when, diff)
		}
	}
	cut := func(service netip.AddrPort, want int) {
		t.Helper()
		if got, err := cutConnections(service); err != nil || got != want {
			t.Errorf("%s: cut %d, %v; want %d", service, got, err, want)
		}
	}
	want("before", append(slices.Clone(stay), direct4, direct6)...)
	cut(services[0], 1)
	want("after IPv4's", append(slices.Clone(stay), direct6)...)
	cut(services[1], 1)
	want("after IPv6's", stay...)
	cut(services[0], 0)
	cut(services[1], 0)
	want("once more", stay...)
}

// TestCutConnectionsWithoutTracking is a host on which nothing was ever tracked.
func TestCutConnectionsWithoutTracking(t *testing.T) {
	n, pod, service := newTrackingNetwork(t)
	n.serve(service, "169.254.169.254:80")
	n.connect(pod, "10.1.0.5", "169.254.169.254:80")
	for _, s := range services {
		if got, err := cutConnections(s); err != nil || got != 0 {
			t.Errorf("%s: cut %d, %v", s, got, err)
		}
	}
}

// nft runs a script of nft.
func (n *network) nft(script string) {
	n.Helper()
	file := filepath.Join(n.TempDir(), "script.nft")
	n.must(os.WriteFile(file, []byte(script), 0o600))
	n.run("nft -f " + file)
}
