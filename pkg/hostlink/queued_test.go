package hostlink

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TestDropQueued sends a packet to each of two addresses that do not answer, and drops the packet
// that is queued for the first. When both addresses resolve, only the second packet arrives.
func TestDropQueued(t *testing.T) {
	for name, tc := range map[string]struct {
		host, dropped, other, family string
		bridged                      bool
	}{
		"routed":  {host: "10.1.0.1/24", dropped: "10.1.0.5", other: "10.1.0.6", family: "ipv4"},
		"bridged": {host: "10.1.0.1/24", dropped: "10.1.0.5", other: "10.1.0.6", family: "ipv4", bridged: true},
		"IPv6":    {host: "fd00:1::1/64", dropped: "fd00:1::5", other: "fd00:1::6", family: "ipv6"},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			link := n.host.Veth("veth0", n.pod, "eth0")
			if tc.bridged {
				bridge := n.host.Bridge("br0")
				n.must(netlink.LinkSetMaster(link, bridge))
				link = bridge
			}
			n.addr(n.host.Handle(), link.Attrs().Name, tc.host)
			n.host.Sysctl("net/"+tc.family+"/neigh/"+link.Attrs().Name+"/retrans_time_ms", "60000") // one probe is sent in this time
			eth0, err := n.inPod.LinkByName("eth0")
			n.must(err)
			n.must(n.inPod.LinkSetUp(eth0))
			// Until the kernel has detected that the peer is up, it drops queued packets.
			for deadline := time.Now().Add(20 * time.Second); link.Attrs().OperState != netlink.OperUp; time.Sleep(time.Millisecond) {
				if link, err = netlink.LinkByName(link.Attrs().Name); err != nil || time.Now().After(deadline) {
					t.Fatalf("the link is not up: %v, %v", link, err)
				}
			}
			var wire int
			n.pod.Do(func() {
				wire, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, int(unix.ETH_P_ALL>>8|unix.ETH_P_ALL<<8))
			})
			n.must(err)
			defer unix.Close(wire)
			timeout := unix.NsecToTimeval(int64(20 * time.Second))
			n.must(unix.SetsockoptTimeval(wire, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout))

			dropped, other := netip.MustParseAddr(tc.dropped), netip.MustParseAddr(tc.other)
			send := func(to netip.Addr, text string) {
				c, err := net.Dial("udp", netip.AddrPortFrom(to, 9).String())
				n.must(err)
				defer c.Close()
				_, err = c.Write([]byte(text))
				n.must(err)
			}
			send(dropped, "secret")
			send(other, "control")
			n.must(DropQueued(dropped))
			for _, ip := range []netip.Addr{dropped, other} {
				n.must(netlink.NeighSet(&netlink.Neigh{LinkIndex: link.Attrs().Index, IP: ip.AsSlice(), HardwareAddr: eth0.Attrs().HardwareAddr, State: netlink.NUD_PERMANENT}))
			}
			for buffer, received := make([]byte, 2048), ""; received != "control"; {
				size, _, err := unix.Recvfrom(wire, buffer, 0)
				if err == unix.EINTR {
					continue
				}
				n.must(err)
				for _, text := range []string{"secret", "control"} {
					if size >= len(text) && string(buffer[size-len(text):size]) == text {
						received = text
					}
				}
				if received == "secret" {
					t.Fatal("the queued packet was sent")
				}
			}

			// Permanent entries stay.
			n.must(DropQueued(dropped))
			entries, err := netlink.NeighList(link.Attrs().Index, 0)
			n.must(err)
			var permanent int
			for _, entry := range entries {
				if entry.State == netlink.NUD_PERMANENT && (entry.IP.Equal(dropped.AsSlice()) || entry.IP.Equal(other.AsSlice())) {
					permanent++
				}
			}
			if permanent != 2 {
				t.Errorf("%d permanent entries remain, want 2: %v", permanent, entries)
			}
		})
	}
}

// TestDropQueuedWithoutARoute drops nothing for addresses without a route.
func TestDropQueuedWithoutARoute(t *testing.T) {
	newNode(t)
	for _, ip := range []string{"203.0.113.1", "2001:db8::1"} {
		if err := DropQueued(netip.MustParseAddr(ip)); err != nil {
			t.Errorf("%s: %v", ip, err)
		}
	}
}
