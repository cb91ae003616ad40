package sockdiag

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/test/netnstest"
)

func TestMain(m *testing.M) { netnstest.Main(m) }

// network is a host and a peer with two addresses of each family. The test runs in the host's
// namespace.
type network struct {
	*testing.T
	peer *netnstest.Netns
}

func newNetwork(t *testing.T) *network {
	t.Helper()
	host, peer := netnstest.New(t), netnstest.New(t)
	host.Veth("veth0", peer, "eth0")
	host.IP("addr add 10.1.0.1/24 dev veth0", "addr add fd00:1::1/64 dev veth0 nodad")
	peer.IP("addr add 10.1.0.5/24 dev eth0", "addr add 10.1.0.6/24 dev eth0",
		"addr add fd00:1::5/64 dev eth0 nodad", "addr add fd00:1::6/64 dev eth0 nodad", "link set eth0 up")
	host.Enter()
	return &network{T: t, peer: peer}
}

func (n *network) must(err error) {
	n.Helper()
	if err != nil {
		n.Fatal(err)
	}
}

// dropInput drops every packet that arrives at the peer from now on. Packets that it sends still
// arrive at the host.
func (n *network) dropInput() {
	n.peer.Run("nft add table inet t && nft 'add chain inet t input { type filter hook input priority 0; policy drop; }'")
}

// listen listens without MPTCP, as the proxy does.
func (n *network) listen(network, address string) *net.TCPListener {
	n.Helper()
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(n.Context(), network, address)
	n.must(err)
	n.Cleanup(func() { l.Close() })
	return l.(*net.TCPListener)
}

// dial connects from one of the peer's addresses.
func (n *network) dial(from netip.Addr, port uint16) *net.TCPConn {
	n.Helper()
	to := netip.AddrPortFrom(netip.MustParseAddr("10.1.0.1"), port)
	if from.Is6() {
		to = netip.AddrPortFrom(netip.MustParseAddr("fd00:1::1"), port)
	}
	var c net.Conn
	n.peer.Do(func() {
		ctx, cancel := context.WithTimeout(n.Context(), 10*time.Second)
		defer cancel()
		var err error
		c, err = (&net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0))}).DialContext(ctx, "tcp", to.String())
		n.must(err)
	})
	n.Cleanup(func() { c.Close() })
	return c.(*net.TCPConn)
}

// sockets returns the host's TCP sockets that have a peer, from the kernel's own tables, sorted. The
// form is "port peer state".
func (n *network) sockets() (all []string) {
	n.Helper()
	for _, file := range []string{"tcp", "tcp6"} {
		data, err := os.ReadFile("/proc/thread-self/net/" + file)
		n.must(err)
		for line := range strings.Lines(string(data)) {
			fields := strings.Fields(line)
			if fields[0] == "sl" || strings.HasSuffix(fields[2], ":0000") {
				continue
			}
			raw, err := hex.DecodeString(strings.Split(fields[2], ":")[0])
			n.must(err)
			for word := range slices.Chunk(raw, 4) {
				slices.Reverse(word)
			}
			peer, _ := netip.AddrFromSlice(raw)
			all = append(all, fmt.Sprintf("%s %s %s", strings.Split(fields[1], ":")[1], peer.Unmap(), fields[3]))
		}
	}
	slices.Sort(all)
	return all
}

// eventually waits until done returns true.
func (n *network) eventually(what string, done func() bool) {
	n.Helper()
	for deadline := time.Now().Add(20 * time.Second); !done(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			n.Fatalf("%s: timed out; sockets %q", what, n.sockets())
		}
	}
}

// unsent makes one socket of the listener to the peer for each state that can hold unsent data. The
// returned function brings them to these states, with unsent data, and returns those that are still
// open. The caller calls dropInput first.
func (n *network) unsent(l *net.TCPListener, peer netip.Addr) (complete func() (open []net.Conn)) {
	n.Helper()
	port := uint16(l.Addr().(*net.TCPAddr).Port)
	connect := func() (client *net.TCPConn, server *net.TCPConn) {
		client = n.dial(peer, port)
		server, err := l.AcceptTCP()
		n.must(err)
		n.Cleanup(func() { server.Close() })
		return client, server
	}
	finish := func(client, server *net.TCPConn) {
		n.must(client.CloseWrite())
		_, err := io.Copy(io.Discard, server)
		n.must(err)
	}
	_, established := connect()
	_, finWait1 := connect()
	closing, closingServer := connect()
	client, closeWait := connect()
	finish(client, closeWait)
	client, lastAck := connect()
	finish(client, lastAck)
	return func() []net.Conn {
		for _, server := range []*net.TCPConn{established, finWait1, closingServer, closeWait, lastAck} {
			_, err := io.WriteString(server, "secret")
			n.must(err)
		}
		for _, server := range []*net.TCPConn{finWait1, closingServer, lastAck} {
			server.Close()
		}
		closing.Close()
		return []net.Conn{established, closeWait}
	}
}

// unsentSockets returns what unsent leaves, in the form of sockets, with one in the backlog.
func unsentSockets(port uint16, peer netip.Addr) (all []string) {
	for _, state := range []string{"01", "01", "04", "08", "09", "0B"} {
		all = append(all, fmt.Sprintf("%04X %s %s", port, peer, state))
	}
	return all
}

// TestDestroy destroys the sockets with one port and one peer in every state that can hold unsent
// data, and no other socket. The sockets belong to dual-stack and to IPv4 listeners. Some are open
// in a process, some not.
func TestDestroy(t *testing.T) {
	for _, tc := range []struct{ network, peer, other string }{
		{"tcp", "10.1.0.5", "10.1.0.6"}, // IPv4 addresses of IPv6 sockets
		{"tcp4", "10.1.0.5", "10.1.0.6"},
		{"tcp", "fd00:1::5", "fd00:1::6"},
	} {
		t.Run(tc.network+" "+tc.peer, func(t *testing.T) {
			n := newNetwork(t)
			peer, other := netip.MustParseAddr(tc.peer), netip.MustParseAddr(tc.other)
			proxy, different := n.listen(tc.network, ":8181"), n.listen(tc.network, ":8182")
			completeOther, completeDifferent, complete := n.unsent(proxy, other), n.unsent(different, peer), n.unsent(proxy, peer)
			n.dial(other, 8181) // in the backlog
			n.dial(peer, 8182)
			n.dial(peer, 8181)
			n.dropInput()
			completeOther()
			completeDifferent()
			open := complete()

			stay := slices.Sorted(slices.Values(append(unsentSockets(8181, other), unsentSockets(8182, peer)...)))
			all := slices.Sorted(slices.Values(append(unsentSockets(8181, peer), stay...)))
			n.eventually("every state", func() bool { return slices.Equal(all, n.sockets()) })

			peers := slices.Repeat([]netip.Addr{netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("2001:db8::1")}, maxPeers)
			peers = slices.Insert(peers, maxPeers+1, peer) // in the middle of the second filter
			destroyed, err := Destroy([]uint16{8180, 8181}, peers)()
			if destroyed != 6 || err != nil {
				t.Errorf("destroyed %d sockets, want 6; %v", destroyed, err)
			}
			if diff := cmp.Diff(stay, n.sockets()); diff != "" {
				t.Errorf("sockets that are left (-want +got):\n%s", diff)
			}
			for _, c := range open {
				if _, err := io.WriteString(c, "more"); err == nil {
					t.Error("a write to a destroyed socket succeeds")
				}
			}
			if destroyed, err := Destroy([]uint16{8181}, []netip.Addr{peer})(); destroyed != 0 || err != nil {
				t.Errorf("a second time: %d, %v, want none", destroyed, err)
			}
		})
	}
}

// TestDestroyMany destroys more sockets than fit into one message of the kernel.
func TestDestroyMany(t *testing.T) {
	n := newNetwork(t)
	peer := netip.MustParseAddr("10.1.0.5")
	l := n.listen("tcp", ":8181")
	const many = 600
	for range many {
		n.dial(peer, 8181)
		c, err := l.Accept()
		n.must(err)
		n.Cleanup(func() { c.Close() })
	}
	if destroyed, err := Destroy([]uint16{8181}, []netip.Addr{peer})(); destroyed != many || err != nil {
		t.Errorf("destroyed %d, %v, want %d", destroyed, err, many)
	}
	if left := n.sockets(); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}

// TestDestroyWithoutCapability destroys as a thread without CAP_NET_ADMIN.
func TestDestroyWithoutCapability(t *testing.T) {
	n := newNetwork(t)
	peer := netip.MustParseAddr("10.1.0.5")
	l := n.listen("tcp", ":8181")
	n.dial(peer, 8181)
	c, err := l.Accept()
	n.must(err)
	n.Cleanup(func() { c.Close() })
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var before, none [2]unix.CapUserData
	n.must(unix.Capget(&header, &before[0]))
	none[0].Permitted, none[1].Permitted = before[0].Permitted, before[1].Permitted
	n.must(unix.Capset(&header, &none[0]))
	conn, err := netlink.Dial(unix.NETLINK_SOCK_DIAG, nil)
	n.must(err)
	defer conn.Close()
	destroyed, err := destroyAll(conn, []uint16{8181}, []netip.Addr{peer}) // not Destroy, whose goroutine has another thread
	n.must(unix.Capset(&header, &before[0]))
	if destroyed != 0 || !errors.Is(err, ErrUnsupported) || !errors.Is(err, unix.EPERM) {
		t.Errorf("destroyed %d, %v, want an error that wraps ErrUnsupported and EPERM", destroyed, err)
	}
}

// TestUnsupported lists the errors of kernels that cannot destroy sockets at all.
func TestUnsupported(t *testing.T) {
	for errno, want := range map[unix.Errno]bool{
		unix.EPROTONOSUPPORT: true, unix.ENOENT: true, unix.EOPNOTSUPP: true, unix.EPERM: true, unix.EACCES: true,
		unix.ENOBUFS: false, unix.EINVAL: false, unix.EAGAIN: false,
	} {
		if got := errors.Is(unsupported(errno), ErrUnsupported); got != want {
			t.Errorf("%s: unsupported is %t, want %t", errno, got, want)
		}
	}
}

func BenchmarkDestroyNone(b *testing.B) {
	for b.Loop() {
		if _, err := Destroy([]uint16{8181}, []netip.Addr{netip.MustParseAddr("10.1.0.5")})(); err != nil {
			b.Fatal(err)
		}
	}
}

// TestDestroyEndsAtItsTimeout has no time left for the kernel's first answer.
func TestDestroyEndsAtItsTimeout(t *testing.T) {
	n := newNetwork(t)
	defer func(before time.Duration) { timeout = before }(timeout)
	timeout = -1
	l := n.listen("tcp", "10.1.0.1:0")
	port := l.Addr().(*net.TCPAddr).AddrPort().Port()
	if _, err := Destroy([]uint16{port}, []netip.Addr{netip.MustParseAddr("10.1.0.5")})(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%v", err)
	}
}
