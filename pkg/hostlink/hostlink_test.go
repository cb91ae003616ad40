package hostlink

import (
	"errors"
	"net"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/ipfamily"
	"github.com/kube2iam-cni/kube2iam-cni/test/netnstest"
)

func TestMain(m *testing.M) { netnstest.Main(m) }

// node is a host and a pod, each in a network namespace. The test runs in the host's.
type node struct {
	*testing.T
	host, pod *netnstest.Netns
	inPod     *netlink.Handle
}

func newNode(t *testing.T) *node {
	t.Helper()
	n := &node{T: t, host: netnstest.New(t), pod: netnstest.New(t)}
	n.inPod = n.pod.Handle()
	n.host.Enter()
	return n
}

func (n *node) must(err error) {
	n.Helper()
	if err != nil {
		n.Fatal(err)
	}
}

func (n *node) addr(h *netlink.Handle, ifName, cidr string) {
	n.Helper()
	link, err := h.LinkByName(ifName)
	n.must(err)
	ip, ipNet, err := net.ParseCIDR(cidr)
	n.must(err)
	ipNet.IP = ip
	n.must(h.AddrAdd(link, &netlink.Addr{IPNet: ipNet, Flags: 0x02 /* IFA_F_NODAD */}))
}

func TestFind(t *testing.T) {
	for name, tc := range map[string]struct {
		build func(*node) netlink.Link // returns the host side
		want  Link                     // Index is the host side's
	}{
		"routed": {
			build: func(n *node) netlink.Link { return n.host.Veth("veth0", n.pod, "eth0") },
			want:  Link{Name: "veth0"},
		},
		"addresses of both families, but no link-local one": {
			build: func(n *node) netlink.Link {
				host := n.host.Veth("veth0", n.pod, "eth0")
				for _, cidr := range []string{"10.1.0.5/32", "10.1.0.6/24", "fd00:1::5/64", "fe80::5/64"} {
					n.addr(n.inPod, "eth0", cidr)
				}
				return host
			},
			want: Link{Name: "veth0", IPs: []netip.Addr{
				netip.MustParseAddr("10.1.0.5"), netip.MustParseAddr("10.1.0.6"), netip.MustParseAddr("fd00:1::5"),
			}},
		},
		"the second of two interfaces": {
			build: func(n *node) netlink.Link {
				n.host.Veth("veth0", n.pod, "net1")
				return n.host.Veth("veth1", n.pod, "eth0")
			},
			want: Link{Name: "veth1"},
		},
		"the same indices on both sides": {
			build: func(n *node) netlink.Link {
				n.must(netlink.LinkAdd(&netlink.Veth{
					LinkAttrs: netlink.LinkAttrs{Name: "veth0", Index: 42}, PeerName: "peer0",
				}))
				peer, err := netlink.LinkByName("peer0")
				n.must(err)
				n.must(netlink.LinkSetName(peer, "eth0"))
				n.must(netlink.LinkSetNsFd(peer, int(n.pod.NsHandle)))
				host, err := netlink.LinkByName("veth0")
				n.must(err)
				return host
			},
			want: Link{Name: "veth0"},
		},
		"bridged": {
			build: func(n *node) netlink.Link { return n.port("1", "1") },
			want:  Link{Name: "veth0", Bridge: "br0", BridgeNF: map[ipfamily.Family]bool{ipfamily.IPv4: true, ipfamily.IPv6: true}},
		},
		"bridged, bridge-nf off": {
			build: func(n *node) netlink.Link { return n.port("0", "0") },
			want:  Link{Name: "veth0", Bridge: "br0", BridgeNF: map[ipfamily.Family]bool{ipfamily.IPv4: false, ipfamily.IPv6: false}},
		},
		"bridged, bridge-nf for IPv4 only": {
			build: func(n *node) netlink.Link { return n.port("1", "0") },
			want:  Link{Name: "veth0", Bridge: "br0", BridgeNF: map[ipfamily.Family]bool{ipfamily.IPv4: true, ipfamily.IPv6: false}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			tc.want.Index = tc.build(n).Attrs().Index
			// In a user namespace programs cannot be listed, so CanBypass is true.
			tc.want.CanBypass = netnstest.InUserNamespace()
			got, err := Find(n.pod.Path(), "eth0")
			n.must(err)
			if diff := cmp.Diff(&tc.want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// port makes the pod's host side a port of br0, and sets bridge-nf of both families.
func (n *node) port(nf4, nf6 string) netlink.Link {
	n.Helper()
	host, bridge := n.host.Veth("veth0", n.pod, "eth0"), n.host.Bridge("br0")
	n.must(netlink.LinkSetMaster(host, bridge))
	n.host.Sysctl("net/bridge/bridge-nf-call-iptables", nf4)
	n.host.Sysctl("net/bridge/bridge-nf-call-ip6tables", nf6)
	return host
}

func TestFindRefuses(t *testing.T) {
	unsupported := func(err error) bool { var e *UnsupportedError; return errors.As(err, &e) }
	is := func(target error) func(error) bool { return func(err error) bool { return errors.Is(err, target) } }
	for name, tc := range map[string]struct {
		build func(*node) (netnsPath string)
		want  func(error) bool
	}{
		"a path that does not exist":     {func(n *node) string { return "/proc/none" }, is(ErrNetns)},
		"an empty path":                  {func(n *node) string { return "" }, is(ErrNetns)},
		"a file that is not a namespace": {func(n *node) string { return "/proc/self/status" }, is(ErrNetns)},
		"the host's own namespace": {func(n *node) string {
			n.must(netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "veth0"}))
			return n.host.Path()
		}, is(ErrNetns)},
		"no interface": {func(n *node) string {
			n.host.Veth("veth0", n.pod, "net1")
			return n.pod.Path()
		}, is(ErrNoInterface)},
		"a macvlan, whose parent index is the uplink's": {func(n *node) string {
			uplink := n.host.Veth("uplink", netnstest.New(n.T), "far")
			n.must(netlink.LinkAdd(&netlink.Macvlan{
				LinkAttrs: netlink.LinkAttrs{Name: "mv0", ParentIndex: uplink.Attrs().Index}, Mode: netlink.MACVLAN_MODE_BRIDGE,
			}))
			mv, err := netlink.LinkByName("mv0")
			n.must(err)
			n.must(netlink.LinkSetNsFd(mv, int(n.pod.NsHandle)))
			link, err := n.inPod.LinkByName("mv0")
			n.must(err)
			n.must(n.inPod.LinkSetName(link, "eth0"))
			return n.pod.Path()
		}, unsupported},
		"both ends in the pod": {func(n *node) string {
			n.must(n.inPod.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "eth1"}))
			return n.pod.Path()
		}, unsupported},
		"a third namespace's veth, whose index is that of another pod's host side": {func(n *node) string {
			other, aside := netnstest.New(n.T), netnstest.New(n.T)
			third := aside.Handle()
			// The host and a third namespace each have a pair with the same two indices. One end of the
			// host's pair is in another pod, one end of the third namespace's pair is in this pod.
			n.must(netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0", Index: 60}, PeerName: "veth0"}))
			n.must(third.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0", Index: 60}, PeerName: "veth0"}))
			n.move("eth0", other)
			ours, err := third.LinkByName("eth0")
			n.must(err)
			n.must(third.LinkSetNsFd(ours, int(n.pod.NsHandle)))
			onHost, err := netlink.LinkByName("veth0")
			n.must(err)
			inThird, err := third.LinkByName("veth0")
			n.must(err)
			if ours, err = n.inPod.LinkByName("eth0"); err != nil || ours.Attrs().Index != 60 || onHost.Attrs().Index != inThird.Attrs().Index {
				n.Fatalf("the indices differ: %v, %v, %v, %v", ours, err, onHost, inThird)
			}
			// The host has an ID for the pod's namespace because of another interface.
			n.host.Veth("veth1", n.pod, "net1")
			return n.pod.Path()
		}, unsupported},
		"a third namespace's veth, whose index is that of the host side of the pod's other interface": {func(n *node) string {
			third := netnstest.New(n.T).Handle()
			other := n.host.Veth("veth0", n.pod, "net1")
			n.must(third.LinkAdd(&netlink.Veth{
				LinkAttrs: netlink.LinkAttrs{Name: "veth0", Index: other.Attrs().Index}, PeerName: "eth0", PeerNamespace: netlink.NsFd(n.pod.NsHandle),
			}))
			return n.pod.Path()
		}, unsupported},
		"a namespace that the host has no link to": {func(n *node) string {
			third := netnstest.New(n.T).Handle()
			n.must(third.LinkAdd(&netlink.Veth{
				LinkAttrs: netlink.LinkAttrs{Name: "veth0"}, PeerName: "eth0", PeerNamespace: netlink.NsFd(n.pod.NsHandle),
			}))
			return n.pod.Path()
		}, unsupported},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			netnsPath := tc.build(n)
			got, err := Find(netnsPath, "eth0")
			if got != nil || !tc.want(err) {
				t.Errorf("got %+v, %v", got, err)
			}
			t.Log(err)
		})
	}
}

func (n *node) move(ifName string, into *netnstest.Netns) {
	n.Helper()
	link, err := netlink.LinkByName(ifName)
	n.must(err)
	n.must(netlink.LinkSetNsFd(link, int(into.NsHandle)))
}

// TestMasterThatIsNoBridge calls setMaster itself: few kernels have all of these devices.
func TestMasterThatIsNoBridge(t *testing.T) {
	for _, master := range []netlink.Link{
		&netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Name: "ovs-system"}, LinkType: "openvswitch"},
		&netlink.Vrf{LinkAttrs: netlink.LinkAttrs{Name: "vrf0"}},
		&netlink.Bond{LinkAttrs: netlink.LinkAttrs{Name: "bond0"}},
	} {
		t.Run(master.Type(), func(t *testing.T) {
			link := &Link{Name: "veth0", Index: 7}
			want := "its host side veth0 belongs to " + master.Attrs().Name + ", which is a " + master.Type() +
				" and no bridge: its packets do not pass the host's rules"
			if got := link.setMaster(master); got != want {
				t.Errorf("got %q, want %q", got, want)
			}
		})
	}
}

// TestHostSideWithVRF has a host side with a master that is no bridge. The error has all values
// that a record of the pod datapath needs.
func TestHostSideWithVRF(t *testing.T) {
	n := newNode(t)
	host := n.host.Veth("veth0", n.pod, "eth0")
	n.addr(n.inPod, "eth0", "10.1.0.5/32")
	vrf := &netlink.Vrf{LinkAttrs: netlink.LinkAttrs{Name: "vrf0"}, Table: 10}
	if err := netlink.LinkAdd(vrf); errors.Is(err, unix.EOPNOTSUPP) {
		t.Skipf("this kernel has no VRF: %v", err)
	} else {
		n.must(err)
	}
	n.must(netlink.LinkSetMaster(host, vrf))
	_, err := Find(n.pod.Path(), "eth0")
	got, _ := errors.AsType[*UnsupportedError](err)
	want := &UnsupportedError{
		IfName: "eth0", Kind: "veth", HostLink: "veth0", HostIndex: host.Attrs().Index, IPs: []netip.Addr{netip.MustParseAddr("10.1.0.5")},
		Reason: "its host side veth0 belongs to vrf0, which is a vrf and no bridge: its packets do not pass the host's rules",
	}
	if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Error(diff)
	}
}
