package hostlink

import (
	"net"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/ipfamily"
	"github.com/kube2iam-cni/kube2iam-cni/test/netnstest"
)

func TestNodeIP(t *testing.T) {
	v4, v6 := netip.MustParseAddr("192.168.7.2"), netip.MustParseAddr("fd00:7::2")
	for name, tc := range map[string]struct {
		build        func(*node)
		want4, want6 netip.Addr // the zero Addr is an error
	}{
		"no route": {build: func(n *node) { n.uplink("192.168.7.2/24", "fd00:7::2/64") }},
		"both families": {
			build: func(n *node) {
				n.uplink("192.168.7.2/24", "fd00:7::2/64")
				n.defaultVia("192.168.7.1")
				n.defaultVia("fd00:7::1")
			},
			want4: v4, want6: v6,
		},
		"IPv4 only": {
			build: func(n *node) {
				n.uplink("192.168.7.2/24")
				n.defaultVia("192.168.7.1")
			},
			want4: v4,
		},
		"a link-local address only": {
			build: func(n *node) {
				n.uplink("192.168.7.2/24", "fe80::2/64")
				n.defaultVia("fe80::1")
			},
		},
		"the route's own source": {
			build: func(n *node) {
				n.uplink("192.168.7.9/24", "192.168.7.2/24")
				link, err := netlink.LinkByName("uplink")
				n.must(err)
				n.must(netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: net.ParseIP("192.168.7.1"), Src: v4.AsSlice()}))
			},
			want4: v4,
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			tc.build(n)
			for family, want := range map[ipfamily.Family]netip.Addr{ipfamily.IPv4: tc.want4, ipfamily.IPv6: tc.want6} {
				got, err := NodeIP(family)
				if got != want || (err == nil) != want.IsValid() {
					t.Errorf("IPv%d: got %v, %v; want %v", family, got, err, want)
				}
			}
		})
	}
}

func (n *node) uplink(cidrs ...string) {
	n.Helper()
	n.host.Veth("uplink", netnstest.New(n.T), "far")
	h, err := netlink.NewHandle()
	n.must(err)
	defer h.Close()
	for _, cidr := range cidrs {
		n.addr(h, "uplink", cidr)
	}
}

func (n *node) defaultVia(gateway string) {
	n.Helper()
	link, err := netlink.LinkByName("uplink")
	n.must(err)
	n.must(netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: net.ParseIP(gateway)}))
}
