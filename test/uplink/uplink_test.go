// Package uplink tests the guard of package uplink on real interfaces. BPF needs the machine's
// root.
package uplink

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/uplink"
	"github.com/kube2iam-cni/kube2iam-cni/test/netnstest"
)

func TestMain(m *testing.M) { netnstest.MainAsRoot(m) }

var metadata = netip.MustParseAddr("169.254.169.254")

const (
	nodeIP, podIP   = "192.0.2.1", "10.1.0.5"
	nodeIP6, podIP6 = "fd00:7::1", "fd00:1::5"
	service         = "169.254.169.254"
	service6        = "fd00:ec2::254"
)

// node is a namespace whose only way out is a veth, as that of a node that is a container. The
// test's thread is in it.
type node struct {
	*testing.T
	host    *netnstest.Netns
	uplink  netlink.Link
	address [6]byte // of the uplink
	wire    *wire
	dir     string
}

// hooks runs a test with each way to attach the guard.
func hooks(t *testing.T, test func(*testing.T, *node)) {
	t.Run("tcx", func(t *testing.T) {
		mount := t.TempDir()
		if err := unix.Mount("bpf", mount, "bpf", 0, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Unmount(mount, unix.MNT_DETACH) })
		test(t, newNode(t, filepath.Join(mount, "uplinks")))
	})
	t.Run("cls_bpf", func(t *testing.T) { test(t, newNode(t, filepath.Join(t.TempDir(), "uplinks"))) })
}

func newNode(t *testing.T, dir string) *node {
	t.Helper()
	host, outside := netnstest.New(t), netnstest.New(t)
	n := &node{T: t, dir: dir, uplink: host.Veth("eth0", outside, "eth0")}
	outside.IP("link set eth0 up")
	host.IP("addr add "+nodeIP+"/24 dev eth0", "addr add "+nodeIP6+"/64 dev eth0 nodad", "route add default via 192.0.2.2", "route add default via fd00:7::2")
	n.address = [6]byte(n.uplink.Attrs().HardwareAddr)
	peer, err := outside.Handle().LinkByName("eth0")
	n.must(err)
	out := capture(t, outside, peer.Attrs().Index)
	n.host, n.wire = host, newWire(t, host, n.uplink.Attrs().Index, out, ethernet([6]byte{2}, controlType, nil))
	host.Enter()
	return n
}

func (n *node) must(err error) {
	n.Helper()
	if err != nil {
		n.Fatal(err)
	}
}

// guard loads a guard as a newly started agent does.
func (n *node) guard() *uplink.Guard {
	n.Helper()
	g, err := uplink.New(metadata, n.dir)
	n.must(err)
	n.Cleanup(func() { g.Close() })
	return g
}

// wantReconcile reconciles and compares the uplinks that were attached.
func (n *node) wantReconcile(when string, g *uplink.Guard, want ...string) {
	n.Helper()
	attached, err := g.Reconcile()
	n.must(err)
	if diff := cmp.Diff(want, attached); diff != "" {
		n.Errorf("%s, attached (-want +got):\n%s", when, diff)
	}
}

// podRequest is a packet that no node with a guard lets out.
func (n *node) podRequest() []byte {
	return ethernet(n.address, unix.ETH_P_IP, ipv4(podIP, service, unix.IPPROTO_TCP, 0, ports(80)))
}

func (n *node) wantGuarded(when string, want bool) {
	n.Helper()
	if n.wire.passes(n.podRequest()) == want {
		n.Errorf("%s, guarded is %v, want %v", when, !want, want)
	}
}

func TestGuard(t *testing.T) {
	hooks(t, func(t *testing.T, n *node) {
		n.wantReconcile("at first", n.guard(), "eth0")
		foreign := [6]byte{2, 0, 0, 0, 0, 1}
		const tcp, udp, icmp, authentication, esp, fragment, hopByHop, icmp6 = unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_ICMP, unix.IPPROTO_AH,
			unix.IPPROTO_ESP, unix.IPPROTO_FRAGMENT, unix.IPPROTO_HOPOPTS, unix.IPPROTO_ICMPV6
		v4 := func(source [6]byte, packet []byte, tags ...uint16) []byte {
			return ethernet(source, unix.ETH_P_IP, packet, tags...)
		}
		v6 := func(source [6]byte, packet []byte, tags ...uint16) []byte {
			return ethernet(source, unix.ETH_P_IPV6, packet, tags...)
		}
		const moreFragments = 0x2000
		truncated := ipv4(podIP, service, tcp, 0, nil)
		truncated[0] |= 0x0f // a header of 60 bytes
		for name, tc := range map[string]struct {
			frame  []byte
			passes bool
		}{
			"IPv4: the node":                           {v4(n.address, ipv4(nodeIP, service, tcp, 0, ports(80))), true},
			"IPv4: the node, with options":             {v4(n.address, ipv4(nodeIP, service, tcp, 0, ports(80), 0x01010101)), true},
			"IPv4: the node, tagged":                   {v4(n.address, ipv4(nodeIP, service, tcp, 0, ports(80)), unix.ETH_P_8021Q), true},
			"IPv4: a pod":                              {n.podRequest(), false},
			"IPv4: a pod, with options":                {v4(n.address, ipv4(podIP, service, tcp, 0, ports(80), 0x01010101, 0x01010101)), false},
			"IPv4: a pod, tagged":                      {v4(n.address, ipv4(podIP, service, tcp, 0, ports(80)), unix.ETH_P_8021Q), false},
			"IPv4: a pod, tagged twice":                {v4(n.address, ipv4(podIP, service, tcp, 0, ports(80)), unix.ETH_P_8021AD, unix.ETH_P_8021Q), false},
			"IPv4: the node's source, another's frame": {v4(foreign, ipv4(nodeIP, service, tcp, 0, ports(80))), false},
			"IPv4: a pod, first fragment":              {v4(n.address, ipv4(podIP, service, tcp, moreFragments, ports(80))), false},
			"IPv4: a pod, first fragment, other port":  {v4(n.address, ipv4(podIP, service, tcp, moreFragments, ports(81))), true},
			"IPv4: a pod, later fragment":              {v4(n.address, ipv4(podIP, service, tcp, 1, ports(81))), false},
			"IPv4: a pod, authentication header":       {v4(n.address, ipv4(podIP, service, authentication, 0, ports(81))), false},
			"IPv4: a pod, encrypted":                   {v4(n.address, ipv4(podIP, service, esp, 0, ports(81))), false},
			"IPv4: a pod, other port":                  {v4(n.address, ipv4(podIP, service, tcp, 0, ports(8080))), true},
			"IPv4: a pod, UDP":                         {v4(n.address, ipv4(podIP, service, udp, 0, ports(80))), true},
			"IPv4: a pod, ICMP":                        {v4(n.address, ipv4(podIP, service, icmp, 0, ports(80))), true},
			"IPv4: a pod, other address":               {v4(n.address, ipv4(podIP, "169.254.169.253", tcp, 0, ports(80))), true},
			"IPv4: a pod, answers":                     {v4(n.address, ipv4(service, podIP, tcp, 0, ports(80))), true},
			"IPv6: the node":                           {v6(n.address, ipv6(nodeIP6, service6, tcp, ports(80))), true},
			"IPv6: a pod":                              {v6(n.address, ipv6(podIP6, service6, tcp, ports(80))), false},
			"IPv6: a pod, tagged":                      {v6(n.address, ipv6(podIP6, service6, tcp, ports(80)), unix.ETH_P_8021Q), false},
			"IPv6: the node's source, another's frame": {v6(foreign, ipv6(nodeIP6, service6, tcp, ports(80))), false},
			"IPv6: a pod, fragment":                    {v6(n.address, ipv6(podIP6, service6, fragment, ports(81))), false},
			"IPv6: a pod, hop-by-hop options":          {v6(n.address, ipv6(podIP6, service6, hopByHop, ports(81))), false},
			"IPv6: the node, fragment":                 {v6(n.address, ipv6(nodeIP6, service6, fragment, ports(81))), true},
			"IPv6: a pod, other port":                  {v6(n.address, ipv6(podIP6, service6, tcp, ports(8080))), true},
			"IPv6: a pod, UDP":                         {v6(n.address, ipv6(podIP6, service6, udp, ports(80))), true},
			"IPv6: a pod, ICMP":                        {v6(n.address, ipv6(podIP6, service6, icmp6, ports(80))), true},
			"IPv6: a pod, other address":               {v6(n.address, ipv6(podIP6, "fd00:ec2::253", tcp, ports(80))), true},
			"IPv4: a pod, without its TCP header":      {v4(n.address, truncated), false},
			"no IP":                                    {ethernet(n.address, unix.ETH_P_ARP, make([]byte, 28)), true},
		} {
			t.Run(name, func(t *testing.T) {
				if got := n.wire.passes(tc.frame); got != tc.passes {
					t.Errorf("passes is %v, want %v", got, tc.passes)
				}
			})
		}
	})
}

// TestGuardOutlivesTheAgent ends the process's guard, and starts another.
func TestGuardOutlivesTheAgent(t *testing.T) {
	hooks(t, func(t *testing.T, n *node) {
		n.wantGuarded("before", false)
		first := n.guard()
		n.wantReconcile("at first", first, "eth0")
		n.wantReconcile("again", first)
		n.must(first.Close())
		n.wantGuarded("without an agent", true)
		second := n.guard()
		n.wantReconcile("by the next agent", second)
		n.wantReconcile("again by the next agent", second)
		n.wantGuarded("with the next agent", true)
		n.must(second.Close())
		n.must(uplink.Remove(n.dir))
		n.wantGuarded("after Remove", false)
		n.must(uplink.Remove(n.dir))
		if qdiscs := n.run("tc qdisc show dev eth0"); strings.Contains(qdiscs, "clsact") {
			t.Errorf("Remove left %s", qdiscs)
		}
		if _, err := os.Stat(n.dir); !os.IsNotExist(err) {
			t.Errorf("Remove left %s: %v", n.dir, err)
		}
	})
}

// TestGuardIsTheFirstProgram has other programs before and after it, which accept all packets.
func TestGuardIsTheFirstProgram(t *testing.T) {
	hooks(t, func(t *testing.T, n *node) {
		attach := func() {
			accept, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()}})
			n.must(err)
			t.Cleanup(func() { accept.Close() })
			if strings.HasSuffix(t.Name(), "tcx") {
				l, err := link.AttachTCX(link.TCXOptions{Interface: n.uplink.Attrs().Index, Program: accept, Attach: ebpf.AttachTCXEgress, Anchor: link.Head()})
				n.must(err)
				t.Cleanup(func() { l.Close() })
				return
			}
			n.must(netlink.FilterAdd(&netlink.BpfFilter{FilterAttrs: netlink.FilterAttrs{
				LinkIndex: n.uplink.Attrs().Index, Parent: netlink.HANDLE_MIN_EGRESS, Priority: 1, Protocol: unix.ETH_P_ALL,
			}, Fd: accept.FD(), Name: "accept", DirectAction: true}))
		}
		if !n.wire.passes(n.podRequest()) {
			t.Fatal("a request does not arrive without a guard")
		}
		g := n.guard()
		n.wantReconcile("at first", g, "eth0")
		for i := range 3 {
			attach()
			n.wantGuarded(fmt.Sprint("behind another program, ", i), false)
			n.wantReconcile(fmt.Sprint("the round after it, ", i), g, "eth0")
			n.wantGuarded(fmt.Sprint("ahead again, ", i), true)
		}
	})
}

func TestGuardComesBack(t *testing.T) {
	hooks(t, func(t *testing.T, n *node) {
		g := n.guard()
		n.wantReconcile("at first", g, "eth0")
		n.must(uplink.Remove(n.dir))
		n.wantGuarded("removed by hand", false)
		if strings.HasSuffix(t.Name(), "tcx") {
			n.must(os.Mkdir(n.dir, 0o700))
		}
		n.wantReconcile("the round after it", g, "eth0")
		n.wantGuarded("made again", true)
	})
}

// TestNewUplinksAndAddresses has the node change.
func TestNewUplinksAndAddresses(t *testing.T) {
	hooks(t, func(t *testing.T, n *node) {
		g := n.guard()
		n.wantReconcile("at first", g, "eth0")
		fromSecond := ethernet(n.address, unix.ETH_P_IP, ipv4("192.0.2.9", service, unix.IPPROTO_TCP, 0, ports(80)))
		if n.wire.passes(fromSecond) {
			t.Error("an address of another passes")
		}
		n.run("ip addr add 192.0.2.9/24 dev eth0")
		n.wantReconcile("with another address", g)
		if !n.wire.passes(fromSecond) {
			t.Error("the node's second address does not pass")
		}
		n.run("ip addr del 192.0.2.9/24 dev eth0")
		n.wantReconcile("without it", g)
		if n.wire.passes(fromSecond) {
			t.Error("an address that the node had passes")
		}
		n.run("ip link add pod0 type veth peer name pod1 && ip link set pod0 up && ip route add 10.1.0.5 dev pod0")
		n.wantReconcile("with a pod", g)
		n.run("ip link add up1 type veth peer name other1 && ip link set up1 up && ip route add default dev up1 table 100")
		n.wantReconcile("with a route of another table", g, "up1")
		n.run("ip link add up2 type veth peer name other2 && ip link set up2 up && ip route add 169.254.0.0/16 nexthop dev up1 nexthop dev up2")
		n.wantReconcile("with a route of several ways", g, "up2")
		n.run("ip link set up2 down && ip link set up2 name renamed && ip link set renamed up && ip route add 169.254.169.254 dev renamed")
		n.wantReconcile("with a renamed uplink", g)
		n.run("ip link del renamed && ip link add up3 type veth peer name other3 && ip link set up3 up && ip -6 route add fd00:ec2::/64 dev up3")
		n.wantReconcile("with an IPv6 route", g, "up3")
		up3, err := netlink.LinkByName("up3")
		n.must(err)
		n.run("ip link del up3 && ip link add up4 index " + fmt.Sprint(up3.Attrs().Index) + " type veth peer name other4 && ip link set up4 up && ip -6 route add fd00:ec2::/64 dev up4")
		n.wantReconcile("with another interface of the same index", g, "up4")
		n.wantGuarded("with other uplinks", true)
	})
}

// TestUplinkWithoutEthernet has a way out by a tunnel, whose packets have no hardware address.
func TestUplinkWithoutEthernet(t *testing.T) {
	hooks(t, func(t *testing.T, n *node) {
		out := tunnel(t, n.host, "tun0")
		n.run("ip link set tun0 up && ip addr add 192.0.2.9/32 dev tun0 && ip route replace default dev tun0")
		tun0, err := netlink.LinkByName("tun0")
		n.must(err)
		w := newWire(t, n.host, tun0.Attrs().Index, out, ipv4(nodeIP, "192.0.2.77", unix.IPPROTO_UDP, 0, ports(53)))
		request := ipv4(podIP, service, unix.IPPROTO_TCP, 0, ports(80))
		if !w.passes(request) {
			t.Fatal("a request does not arrive without a guard")
		}
		n.wantReconcile("with a tunnel", n.guard(), "eth0", "tun0")
		for name, tc := range map[string]struct {
			packet []byte
			passes bool
		}{
			"a pod":            {request, false},
			"a pod, IPv6":      {ipv6(podIP6, service6, unix.IPPROTO_TCP, ports(80)), false},
			"a pod, elsewhere": {ipv4(podIP, "192.0.2.7", unix.IPPROTO_TCP, 0, ports(80)), true},
			"the node":         {ipv4("192.0.2.9", service, unix.IPPROTO_TCP, 0, ports(80)), true},
			"the node, IPv6":   {ipv6(nodeIP6, service6, unix.IPPROTO_TCP, ports(80)), true},
		} {
			if got := w.passes(tc.packet); got != tc.passes {
				t.Errorf("%s: passes is %v, want %v", name, got, tc.passes)
			}
		}
	})
}

func (n *node) run(command string) string {
	n.Helper()
	out, err := exec.Command("sh", "-c", command).CombinedOutput()
	if err != nil {
		n.Fatalf("%s: %v\n%s", command, err, out)
	}
	return string(out)
}

// TestGuardChangesItsHook has the BPF file system appear between two agents. The first one's filter does
// not stay: no process would tell it of the node's new addresses.
func TestGuardChangesItsHook(t *testing.T) {
	mount := t.TempDir()
	n := newNode(t, filepath.Join(mount, "uplinks"))
	first := n.guard()
	n.wantReconcile("by a filter", first, "eth0")
	n.must(first.Close())
	n.must(unix.Mount("bpf", mount, "bpf", 0, ""))
	t.Cleanup(func() { unix.Unmount(mount, unix.MNT_DETACH) })
	second := n.guard()
	n.wantReconcile("by tcx", second, "eth0")
	if qdiscs := n.run("tc qdisc show dev eth0"); strings.Contains(qdiscs, "clsact") {
		t.Errorf("the next agent left %s", qdiscs)
	}
	n.run("ip addr add 192.0.2.9/24 dev eth0")
	n.wantReconcile("with another address", second)
	n.wantGuarded("by tcx", true)
	if !n.wire.passes(ethernet(n.address, unix.ETH_P_IP, ipv4("192.0.2.9", service, unix.IPPROTO_TCP, 0, ports(80)))) {
		t.Error("the node's new address does not pass")
	}
}

// TestManyAddresses has more addresses than a node usually has, as with kube-proxy in IPVS mode.
func TestManyAddresses(t *testing.T) {
	hooks(t, func(t *testing.T, n *node) {
		var batch strings.Builder
		for i := range 5000 {
			fmt.Fprintf(&batch, "addr add 10.96.%d.%d/32 dev lo\n", i/250, i%250+1)
		}
		n.host.IP(batch.String())
		n.wantReconcile("with 5,000 addresses", n.guard(), "eth0")
		n.wantGuarded("with 5,000 addresses", true)
		if !n.wire.passes(ethernet(n.address, unix.ETH_P_IP, ipv4(nodeIP, service, unix.IPPROTO_TCP, 0, ports(80)))) {
			t.Error("the node does not pass")
		}
	})
}
