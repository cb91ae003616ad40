package netns

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

// gaps are the times between a pod's death and the ADD of the pod that gets its address.
var gaps = []time.Duration{0, 2 * time.Second, 5 * time.Second, 25 * time.Second}

// The ports of the servers that these tests run beside the proxy, or in its place.
const (
	proxyPort   = 8181
	controlPort = 8190 // the plugin knows nothing of it
)

// onEachGap runs a test for each gap, all at the same time, on a node of each setup.
func onEachGap(t *testing.T, setups []setup, prepare func(n *node), test func(n *node, gap time.Duration, first netip.Addr)) {
	onThese(t, setups, func(t *testing.T, n *node) {
		// With a timeout of a second for each try, the kernel would give up after 14 s.
		n.must(n.Node.Do(func() error { return os.WriteFile("/proc/sys/net/ipv4/tcp_retries2", []byte("200"), 0o644) }))
		n.stubbornServer(controlPort)
		prepare(n)
		for i, gap := range gaps {
			t.Run("gap "+gap.String(), func(t *testing.T) {
				t.Parallel()
				one := *n
				one.t = t
				test(&one, gap, netip.AddrFrom4([4]byte{10, 201, 0, byte(50 + 20*i)}))
			})
		}
	})
}

// TestNoAnswerReachesTheNextHolder: a pod dies before it acknowledges its credentials, and the
// next pod gets its address. When ADD has returned, the node has no socket to the address. The
// next pod receives nothing of the answer in the time in which the control receives its
// predecessor's.
func TestNoAnswerReachesTheNextHolder(t *testing.T) {
	onEachGap(t, []setup{bridged, routedIPTables}, func(n *node) { n.proxy(impatient...) }, func(n *node, gap time.Duration, first netip.Addr) {
		request := "GET " + credentials + "other HTTP/1.1\r\nHost: a\r\n\r\n"
		n.inherit(gap, "proxy", testbed.MetadataAddr, first, func(s *testbed.Sandbox) (string, string) {
			var doc struct{ AccessKeyID string }
			n.must(json.Unmarshal([]byte(n.get(s, credentials+"other").body), &doc))
			return request, doc.AccessKeyID
		})
	})
}

// TestPluginDropsUnacknowledgedData: the same with a server in the proxy's place that never
// closes a connection, so only the plugin can drop the data.
func TestPluginDropsUnacknowledgedData(t *testing.T) {
	onEachGap(t, []setup{bridgeIPTables, routed}, func(n *node) { n.stubbornServer(proxyPort) }, func(n *node, gap time.Duration, first netip.Addr) {
		n.inherit(gap, "server", nodeAt(proxyPort), first, stubbornRequest)
	})
}

func nodeAt(port uint16) string { return netip.AddrPortFrom(testbed.NodeIP, port).String() }

// inherit makes pods die with an unacknowledged answer, and gives their addresses to other pods
// after the gap. DEL runs, or does not run, or does not run and the record is lost. The
// control's answer comes from a server whose sockets are not destroyed: its next holder receives
// it, so the others could have received theirs.
func (n *node) inherit(gap time.Duration, name, server string, first netip.Addr, ask func(*testbed.Sandbox) (request, secret string)) {
	type death struct {
		name    string
		die     func(*testbed.Sandbox)
		former  *testbed.Sandbox
		secret  string
		capture *capture
	}
	deaths := []*death{
		{name: "del", die: func(s *testbed.Sandbox) {
			n.must(n.StopPod(n.t.Context(), s))
			if left := n.socketsTo(s.IP, proxyPort); left != 0 {
				n.t.Errorf("%d sockets are left after DEL", left)
			}
		}},
		{name: "nodel", die: n.vanish},
		{name: "lost", die: func(s *testbed.Sandbox) { n.vanish(s); n.loseRecord(s) }},
		{name: "control", die: n.vanish},
	}
	succeed := func(d *death) {
		next := n.pendingAt(d.former.Name+"-heir", "app", d.former.IP)
		// Its kernel would answer what belongs to no connection with a reset, which ends the
		// sender's socket.
		n.nft(next, "add table inet silence")
		n.nft(next, "add chain inet silence out { type filter hook output priority 0 ; }")
		n.nft(next, "add rule inet silence out tcp flags rst drop")
		n.must(n.Add(n.t.Context(), next))
		d.capture = n.capture(next)
		if left := n.socketsTo(next.IP, proxyPort); left != 0 {
			n.t.Errorf("%s: %d sockets are left after ADD", d.name, left)
		}
	}
	for _, d := range deaths {
		d.former = n.pendingAt(fmt.Sprintf("%s-%s-%s", name, d.name, gap), "other", first)
		first = first.Next()
		n.must(n.Add(n.t.Context(), d.former))
		n.must(n.KubeAPI.SetStatus("default", d.former.Name, "Running", d.former.IP.String()))
		server, ask := server, ask
		if d.name == "control" {
			server, ask = nodeAt(controlPort), stubbornRequest
		}
		var request string
		request, d.secret = ask(d.former)
		n.dieUnacknowledged(d.former, server, request, d.die)
		if gap == 0 {
			succeed(d)
		}
	}
	if gap > 0 {
		time.Sleep(gap)
		for _, d := range deaths {
			succeed(d)
		}
	}
	control := deaths[len(deaths)-1]
	n.eventually(func() bool { return control.capture.received(control.secret) })
	for _, d := range deaths[:len(deaths)-1] {
		if d.capture.received(d.secret) {
			n.t.Errorf("%s: the next holder of the address received its predecessor's answer", d.name)
		}
	}
}

// pendingAt returns a pod whose ADD will request an address.
func (n *node) pendingAt(name, role string, ip netip.Addr) *testbed.Sandbox {
	n.t.Helper()
	s := n.pending(name, role)
	s.IP = ip
	return s
}

// stubbornRequest returns a request and the secret that the stubborn server answers.
func stubbornRequest(s *testbed.Sandbox) (request, secret string) {
	return "for " + s.Name + ".\n", "the secret of " + s.Name + "."
}

// stubbornServer serves on the node until the test ends. It answers a line on each connection
// and closes none. The kernel retransmits an answer for a quarter of an hour, once a second if
// it has TCP_RTO_MAX_MS.
func (n *node) stubbornServer(port uint16) {
	n.t.Helper()
	l, err := n.Node.Listen("tcp", fmt.Sprintf(":%d", port))
	n.must(err)
	var mu sync.Mutex
	var open []net.Conn
	n.t.Cleanup(func() {
		l.Close()
		mu.Lock()
		defer mu.Unlock()
		for _, c := range open {
			c.Close()
		}
	})
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open = append(open, c)
			mu.Unlock()
			go func() {
				const rtoMax = 44 // TCP_RTO_MAX_MS, linux/tcp.h; since Linux 6.15
				if raw, err := c.(*net.TCPConn).SyscallConn(); err == nil {
					raw.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, rtoMax, 1000) })
				}
				line := make([]byte, 1024)
				if size, err := c.Read(line); err == nil {
					io.WriteString(c, "the secret of "+strings.TrimSpace(strings.TrimPrefix(string(line[:size]), "for ")))
				}
			}()
		}
	}()
}

// dieUnacknowledged makes a pod send a request and die without an acknowledgement once the node
// has sent the answer.
func (n *node) dieUnacknowledged(s *testbed.Sandbox, server, request string, die func(*testbed.Sandbox)) {
	n.t.Helper()
	c, err := s.Netns.DialContext(n.t.Context(), "tcp", server)
	n.must(err)
	n.nft(s, "add table inet silence")
	n.nft(s, "add chain inet silence in { type filter hook input priority 0 ; policy drop ; }")
	_, err = io.WriteString(c, request)
	n.must(err)
	n.eventually(func() bool { return n.unacknowledged(s.IP) > 0 })
	_, err = s.Netns.Run(n.t.Context(), n.ClientEnv(), "ip", "link", "set", "eth0", "down")
	n.must(err)
	n.must(c.(*net.TCPConn).SetLinger(0)) // nothing of the connection holds the namespace then
	n.must(c.Close())
	die(s)
}

func (n *node) nft(s *testbed.Sandbox, command string) {
	n.t.Helper()
	_, err := s.Netns.Run(n.t.Context(), n.ClientEnv(), "nft", command)
	n.must(err)
}

// vanish ends a pod without a DEL and frees its address.
func (n *node) vanish(s *testbed.Sandbox) {
	n.t.Helper()
	n.endWithoutDEL(s)
	n.must(n.KubeAPI.DeletePod(s.Namespace, s.Name))
	n.must(os.Remove(filepath.Join(n.Dir, "ipam", testbed.Network, s.IP.String())))
}

// loseRecord deletes an attachment's record.
func (n *node) loseRecord(s *testbed.Sandbox) {
	n.t.Helper()
	n.must(os.Remove(filepath.Join(n.StateDir, "by-ip", s.IP.String())))
	n.must(os.Remove(filepath.Join(n.StateDir, "attachments", attachment.ID(s.ContainerID, "eth0")+".json")))
}

// tcpSocket is a TCP socket of the node in /proc/net/tcp.
type tcpSocket struct {
	port   uint16
	peer   netip.Addr
	state  string
	queued bool // data that was not acknowledged
}

func (n *node) tcpSockets() (all []tcpSocket) {
	n.t.Helper()
	for _, file := range []string{"tcp", "tcp6"} {
		var data []byte
		n.must(n.Node.Do(func() (err error) {
			data, err = os.ReadFile("/proc/thread-self/net/" + file)
			return err
		}))
		for line := range strings.Lines(string(data)) {
			fields := strings.Fields(line)
			if fields[0] == "sl" {
				continue
			}
			var s tcpSocket
			_, err := fmt.Sscanf(fields[1][strings.Index(fields[1], ":"):], ":%X", &s.port)
			n.must(err)
			address, err := hex.DecodeString(fields[2][:strings.Index(fields[2], ":")])
			n.must(err)
			for word := range slices.Chunk(address, 4) {
				slices.Reverse(word) // each in the order of the machine
			}
			s.peer, _ = netip.AddrFromSlice(address)
			s.peer, s.state, s.queued = s.peer.Unmap(), fields[3], !strings.HasPrefix(fields[4], "00000000:")
			all = append(all, s)
		}
	}
	return all
}

// socketsTo counts the sockets of a port to a peer, without those in TIME_WAIT, which send
// nothing.
func (n *node) socketsTo(peer netip.Addr, port uint16) (count int) {
	n.t.Helper()
	for _, s := range n.tcpSockets() {
		if s.peer == peer && s.port == port && s.state != "06" {
			count++
		}
	}
	return count
}

// unacknowledged counts the sockets with data that the peer has not acknowledged.
func (n *node) unacknowledged(peer netip.Addr) (count int) {
	n.t.Helper()
	for _, s := range n.tcpSockets() {
		if s.peer == peer && s.queued {
			count++
		}
	}
	return count
}

// capture records every frame that arrives in a network namespace.
type capture struct {
	mu     sync.Mutex
	frames [][]byte
}

// capture starts now and ends with the test.
func (n *node) capture(s *testbed.Sandbox) *capture {
	n.t.Helper()
	c := new(capture)
	var fd int
	n.must(s.Netns.Do(func() (err error) {
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(htons(unix.ETH_P_ALL))); err != nil {
			return err
		}
		wait := unix.NsecToTimeval(int64(50 * time.Millisecond))
		return unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait)
	}))
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for buffer := make([]byte, 64<<10); ; {
			size, _, err := unix.Recvfrom(fd, buffer, 0)
			select {
			case <-done:
				return
			default:
			}
			if err == nil {
				c.mu.Lock()
				c.frames = append(c.frames, bytes.Clone(buffer[:size]))
				c.mu.Unlock()
			}
		}
	}()
	n.t.Cleanup(func() {
		close(done)
		<-ended
		unix.Close(fd)
	})
	return c
}

// received reports whether a frame with the text has arrived.
func (c *capture) received(text string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.ContainsFunc(c.frames, func(f []byte) bool { return bytes.Contains(f, []byte(text)) })
}
