package agent

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/test/netnstest"
)

// tracking has the kernel track what the host forwards and sends.
const tracking = `table inet tracking {
	chain forward { type filter hook forward priority 0; policy accept; ct state new accept; }
	chain output { type filter hook output priority 0; policy accept; ct state new accept; }
	chain redirected { type nat hook prerouting priority -100; policy accept; ip saddr 10.1.0.6 tcp dport 80 dnat ip to 192.168.7.2:8181; }
}`

// newTrackingNetwork makes a host, in which the test runs, a pod with two IPv4 addresses, of which
// one is redirected, and a metadata service behind the host.
func newTrackingNetwork(t *testing.T) (host, pod, service *netnstest.Netns) {
	host, pod, service = netnstest.New(t), netnstest.New(t), netnstest.New(t)
	host.Enter()
	host.Veth("veth0", pod, "eth0")
	host.Veth("uplink", service, "far")
	host.Sysctl("net/ipv4/ip_forward", "1")
	host.Sysctl("net/ipv6/conf/all/forwarding", "1")
	host.IP("addr add 10.1.0.1/24 dev veth0", "addr add fd00:1::1/64 dev veth0 nodad",
		"addr add 192.168.7.2/24 dev uplink", "addr add fd00:7::2/64 dev uplink nodad")
	pod.IP("addr add 10.1.0.5/24 dev eth0", "addr add 10.1.0.6/24 dev eth0", "addr add fd00:1::5/64 dev eth0 nodad",
		"link set eth0 up", "route add default via 10.1.0.1", "route add default via fd00:1::1")
	service.IP("addr add 192.168.7.1/24 dev far", "addr add fd00:7::1/64 dev far nodad", "addr add 169.254.169.254/32 dev lo",
		"addr add 169.254.169.253/32 dev lo", "addr add fd00:ec2::254/128 dev lo nodad", "link set far up",
		"route add default via 192.168.7.2", "route add default via fd00:7::2")
	host.IP("route add default via 192.168.7.1", "route add default via fd00:7::1")
	return host, pod, service
}

// holdConnections keeps every connection to an address of a namespace open until the test ends.
func holdConnections(t *testing.T, ns *netnstest.Netns, address string) {
	l := ns.Listen("tcp", address)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			t.Cleanup(func() { c.Close() })
		}
	}()
}

// connect makes a connection that lasts as long as the test, and returns how the kernel tracks it.
func connect(t *testing.T, ns *netnstest.Netns, source, address string) string {
	t.Helper()
	ns.Do(func() {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(source)}, FallbackDelay: -1, Timeout: 10 * time.Second}
		c, err := d.DialContext(t.Context(), "tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
	})
	return fmt.Sprintf("%s to %s", source, address)
}

// tracked returns the TCP connections that the host tracks, sorted.
func tracked(t *testing.T) []string {
	t.Helper()
	var all []string
	for _, family := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
		flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, family)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range flows {
			if f.Forward.Protocol == unix.IPPROTO_TCP {
				all = append(all, fmt.Sprintf("%s to %s", f.Forward.SrcIP, net.JoinHostPort(f.Forward.DstIP.String(), fmt.Sprint(f.Forward.DstPort))))
			}
		}
	}
	slices.Sort(all)
	return all
}

// TestCutConnections ends a pod's connections to the service that go to the service itself, and no
// other.
func TestCutConnections(t *testing.T) {
	host, pod, service := newTrackingNetwork(t)
	host.NFT(tracking)
	for _, address := range []string{"169.254.169.254:80", "169.254.169.254:81", "169.254.169.253:80", "[fd00:ec2::254]:80", "[fd00:ec2::254]:81"} {
		holdConnections(t, service, address)
	}
	holdConnections(t, host, "192.168.7.2:8181")
	var stay []string
	direct4 := connect(t, pod, "10.1.0.5", "169.254.169.254:80")
	direct6 := connect(t, pod, "fd00:1::5", "[fd00:ec2::254]:80")
	stay = append(stay,
		connect(t, host, "192.168.7.2", "169.254.169.254:80"), // the host's own
		connect(t, host, "10.1.0.1", "169.254.169.254:80"),    // the host's own, by the address that is the pod's gateway
		connect(t, host, "fd00:7::2", "[fd00:ec2::254]:80"),
		connect(t, pod, "10.1.0.5", "169.254.169.253:80"), // another destination
		connect(t, pod, "10.1.0.5", "169.254.169.254:81"), // another port
		connect(t, pod, "fd00:1::5", "[fd00:ec2::254]:81"),
		connect(t, pod, "10.1.0.6", "169.254.169.254:80"), // redirected
	)
	want := func(when string, all ...string) {
		t.Helper()
		slices.Sort(all)
		if diff := cmp.Diff(all, tracked(t)); diff != "" {
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

// TestCutConnectionsWithoutTracking has a host without a connection tracking table.
func TestCutConnectionsWithoutTracking(t *testing.T) {
	_, pod, service := newTrackingNetwork(t)
	holdConnections(t, service, "169.254.169.254:80")
	connect(t, pod, "10.1.0.5", "169.254.169.254:80")
	for _, s := range services {
		if got, err := cutConnections(s); err != nil || got != 0 {
			t.Errorf("%s: cut %d, %v", s, got, err)
		}
	}
}
