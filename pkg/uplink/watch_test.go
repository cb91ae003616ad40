package uplink

import (
	"bytes"
	"context"
	"net/netip"
	"slices"
	"testing"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/test/netnstest"
)

func TestMain(m *testing.M) { netnstest.Main(m) }

var services = []netip.Addr{netip.MustParseAddr("169.254.169.254"), netip.MustParseAddr("fd00:ec2::254")}

// TestConcernsGuard has the kernel's own notifications of each change.
func TestConcernsGuard(t *testing.T) {
	for change, want := range map[string]bool{
		"route add default dev eth0":                  true,
		"route add 169.254.0.0/16 dev eth0 table 7":   true,
		"route add fd00:ec2::/64 dev eth0":            true,
		"addr add 192.0.2.9/24 dev eth0":              true,
		"addr del 192.0.2.8/24 dev eth0":              true,
		"link set lo mtu 16384":                       true, // stands for a physical interface: it has no kind
		"route add 10.1.0.5 dev eth0":                 false,
		"route add fd00:1::/64 dev eth0":              false,
		"addr add 169.254.1.1/32 dev eth0 scope link": false,
		"link set eth0 mtu 1400":                      false, // a veth, as a pod's
	} {
		t.Run(change, func(t *testing.T) {
			host, outside := netnstest.New(t), netnstest.New(t)
			host.Veth("eth0", outside, "eth0")
			host.IP("addr add 192.0.2.8/24 dev eth0")
			host.Enter()
			conn, err := netlink.Dial(unix.NETLINK_ROUTE, &netlink.Config{Groups: groups})
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			host.IP(change, "link set eth0 alias sentinel")
			for {
				messages, err := conn.Receive()
				if err != nil {
					t.Fatal(err)
				}
				if slices.ContainsFunc(messages, func(m netlink.Message) bool { return concernsGuard(m, services) }) {
					if !want {
						t.Error("the change concerns the guard")
					}
					return
				}
				if slices.ContainsFunc(messages, func(m netlink.Message) bool { return bytes.Contains(m.Data, []byte("sentinel")) }) {
					if want {
						t.Error("the change does not concern the guard")
					}
					return
				}
			}
		})
	}
}

func TestWatch(t *testing.T) {
	host, outside := netnstest.New(t), netnstest.New(t)
	host.Veth("eth0", outside, "eth0")
	host.Enter()
	ctx, cancel := context.WithCancel(t.Context())
	notified, ended := make(chan struct{}, 100), make(chan error)
	started := make(chan struct{})
	go func() {
		host.Enter()
		close(started)
		ended <- Watch(ctx, services[0], func() { notified <- struct{}{} })
	}()
	<-started
	for i := 0; ; i++ { // Watch may subscribe after the first change
		host.IP("addr replace 192.0.2.9/24 dev eth0", "addr del 192.0.2.9/24 dev eth0")
		select {
		case <-notified:
			cancel()
			if err := <-ended; err != nil {
				t.Errorf("after its end: %v", err)
			}
			return
		default:
		}
	}
}
