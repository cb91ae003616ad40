package uplink

import (
	"net"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func attrs(index int, name string, more ...func(*netlink.LinkAttrs)) netlink.LinkAttrs {
	a := netlink.LinkAttrs{Index: index, Name: name, EncapType: "ether", NetNsID: -1, HardwareAddr: net.HardwareAddr{2, 0, 0, 0, 0, byte(index)}}
	for _, change := range more {
		change(&a)
	}
	return a
}

func above(parent int) func(*netlink.LinkAttrs) {
	return func(a *netlink.LinkAttrs) { a.ParentIndex = parent }
}
func portOf(master int) func(*netlink.LinkAttrs) {
	return func(a *netlink.LinkAttrs) { a.MasterIndex = master }
}
func ofNetns(id int) func(*netlink.LinkAttrs) { return func(a *netlink.LinkAttrs) { a.NetNsID = id } }
func encapsulated(kind string) func(*netlink.LinkAttrs) {
	return func(a *netlink.LinkAttrs) { a.EncapType = kind }
}

func route(dst string, link int, kind int) netlink.Route {
	r := netlink.Route{LinkIndex: link, Type: kind, Family: unix.AF_INET}
	if dst != "" {
		_, r.Dst, _ = net.ParseCIDR(dst)
		if r.Dst.IP.To4() == nil {
			r.Family = unix.AF_INET6
		}
	}
	return r
}

// testHost has a physical interface in a bridge, a bond with a VLAN, pods, and tunnels.
func testHost() host {
	loopback := attrs(1, "lo", func(a *netlink.LinkAttrs) { a.Flags = net.FlagLoopback })
	return host{
		links: []netlink.Link{
			&netlink.Device{LinkAttrs: loopback},
			&netlink.Device{LinkAttrs: attrs(2, "eth0", portOf(3))},
			&netlink.Bridge{LinkAttrs: attrs(3, "br0")},
			&netlink.Device{LinkAttrs: attrs(4, "eth1", portOf(5))},
			&netlink.Bond{LinkAttrs: attrs(5, "bond0")},
			&netlink.Vlan{LinkAttrs: attrs(6, "bond0.7", above(5))},
			&netlink.Veth{LinkAttrs: attrs(7, "pod0", above(2), ofNetns(0))},
			&netlink.Macvlan{LinkAttrs: attrs(8, "shim0", above(6))},
			&netlink.Macvlan{LinkAttrs: attrs(9, "moved", above(2), ofNetns(1))},
			&netlink.Vxlan{LinkAttrs: attrs(10, "vxlan0")},
			&netlink.Wireguard{LinkAttrs: attrs(11, "wg0", encapsulated("none"))},
			&netlink.Dummy{LinkAttrs: attrs(12, "dummy0")},
			&netlink.Veth{LinkAttrs: attrs(13, "kind0", ofNetns(2))},
		},
		routes: []netlink.Route{
			route("10.1.0.5/32", 7, unix.RTN_UNICAST), route("10.2.0.0/16", 10, unix.RTN_UNICAST),
			route("127.0.0.0/8", 1, unix.RTN_LOCAL), route("169.254.169.254/32", 12, unix.RTN_BLACKHOLE),
		},
	}
}

func TestUplinks(t *testing.T) {
	always := []string{"eth0", "eth1", "bond0", "bond0.7"}
	for name, tc := range map[string]struct {
		route netlink.Route
		more  []string
	}{
		"no route":            {route("10.3.0.0/16", 3, unix.RTN_UNICAST), nil},
		"a default route":     {route("", 3, unix.RTN_UNICAST), []string{"br0"}},
		"0.0.0.0/0":           {route("0.0.0.0/0", 13, unix.RTN_UNICAST), []string{"kind0"}},
		"the service's route": {route("169.254.169.254/32", 11, unix.RTN_UNICAST), []string{"wg0"}},
		"its IPv6 route":      {route("fd00:ec2::/32", 10, unix.RTN_UNICAST), []string{"vxlan0"}},
		"several ways": {netlink.Route{Type: unix.RTN_UNICAST, Family: unix.AF_INET, MultiPath: []*netlink.NexthopInfo{{LinkIndex: 11}, {LinkIndex: 13}}},
			[]string{"wg0", "kind0"}},
	} {
		t.Run(name, func(t *testing.T) {
			h := testHost()
			h.routes = append(h.routes, tc.route)
			var got []string
			for _, l := range h.uplinks([]netip.Addr{netip.MustParseAddr("169.254.169.254"), netip.MustParseAddr("fd00:ec2::254")}) {
				got = append(got, l.Attrs().Name)
			}
			if diff := cmp.Diff(append(always[:len(always):len(always)], tc.more...), got, cmp.Transformer("sorted", sorted)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func sorted(names []string) map[string]bool {
	set := make(map[string]bool)
	for _, n := range names {
		set[n] = true
	}
	return set
}

func TestHardwareAddrs(t *testing.T) {
	h := testHost()
	for name, want := range map[string][]int{
		"eth0":    {2, 3},       // and its bridge's; a macvlan in another namespace is a pod's
		"eth1":    {4, 5, 6, 8}, // and those of its bond, a VLAN of it, and a macvlan on that
		"bond0.7": {6, 8},
		"kind0":   {13},
		"wg0":     nil,
	} {
		for _, l := range h.links {
			if l.Attrs().Name != name {
				continue
			}
			var got []int
			for _, a := range h.hardwareAddrs(l) {
				got = append(got, int(a[5]))
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%s (-want +got):\n%s", name, diff)
			}
		}
	}
}
