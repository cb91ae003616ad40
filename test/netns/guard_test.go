package netns

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/test/netnstest"
	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

// authentication is the number of the authentication header (RFC 4302).
const authentication = unix.IPPROTO_AH

// authenticated puts an authentication header before a payload, with an integrity check value of 96
// zero bits.
func authenticated(next byte, payload []byte) []byte {
	return join([]byte{next, 24/4 - 2, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1}, make([]byte, 12), payload)
}

// extension is an extension header of IPv6 with 4 bytes of padding, either hop-by-hop or
// destination options (RFC 8200).
func extension(next byte, payload []byte) []byte {
	return join([]byte{next, 0, 1, 4, 0, 0, 0, 0}, payload)
}

// fragments6 and fragments4 return the two fragments of a payload. The length of the first is a
// multiple of 8.
func fragments6(src, dst netip.Addr, next byte, payload []byte, first int) [][]byte {
	header := func(offset int, more byte) []byte {
		return []byte{next, 0, byte(offset >> 8), byte(offset) | more, 0, 0, 0, byte(len(payload))}
	}
	return [][]byte{
		packet(src, dst, unix.IPPROTO_FRAGMENT, join(header(0, 1), payload[:first])),
		packet(src, dst, unix.IPPROTO_FRAGMENT, join(header(first, 0), payload[first:])),
	}
}

func fragments4(src, dst netip.Addr, protocol byte, payload []byte, first int) [][]byte {
	both := [][]byte{packet(src, dst, protocol, payload[:first]), packet(src, dst, protocol, payload[first:])}
	for i, p := range both {
		binary.BigEndian.PutUint16(p[4:], 0x1234+uint16(len(payload)))
		binary.BigEndian.PutUint16(p[6:], []uint16{0x2000, uint16(first / 8)}[i])
	}
	return both
}

// sourceRouted is a packet to a router with a loose source route to its destination (RFC 791).
func sourceRouted(src, by, dst netip.Addr, payload []byte) []byte {
	p := packet(src, by, unix.IPPROTO_TCP, payload)
	const loose, end = 131, 0
	p[0] = 0x47
	p = join(p[:20], []byte{loose, 7, 4}, dst.AsSlice(), []byte{end}, payload)
	binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
	return p
}

// bySourceRoute is the kind of packet that has the service's address only behind the forward hook.
const bySourceRoute = "TCP by a source route"

// hidden returns packets from a pod to the service that no rule redirects, one or two of a kind.
// The last of each ends in a text.
func hidden(src, dst netip.Addr, text func(kind string) string) map[string][][]byte {
	all := make(map[string][][]byte)
	tcp := func(kind string, port uint16) []byte { return segment(40000, port, text(kind)) }
	whole := func(kind string, protocol byte, payload func(kind string) []byte) {
		all[kind] = [][]byte{packet(src, dst, protocol, payload(kind))}
	}
	whole("TCP to another port", unix.IPPROTO_TCP, func(kind string) []byte { return tcp(kind, 8080) })
	whole("TCP behind an authentication header", authentication, func(kind string) []byte {
		return authenticated(unix.IPPROTO_TCP, tcp(kind, 80))
	})
	whole("SCTP", unix.IPPROTO_SCTP, func(kind string) []byte { return tcp(kind, 80) })
	if src.Is4() {
		all["TCP in fragments"] = fragments4(src, dst, unix.IPPROTO_TCP, tcp("TCP in fragments", 8080), 16)
		all["TCP behind an authentication header in fragments"] = fragments4(src, dst, authentication,
			authenticated(unix.IPPROTO_TCP, tcp("TCP behind an authentication header in fragments", 80)), 8)
		all[bySourceRoute] = [][]byte{sourceRouted(src, testbed.NodeIP, dst, tcp(bySourceRoute, 80))}
		return all
	}
	whole("UDP", unix.IPPROTO_UDP, func(kind string) []byte { return datagram(text(kind)) })
	whole("TCP behind destination options", unix.IPPROTO_DSTOPTS, func(kind string) []byte { return extension(unix.IPPROTO_TCP, tcp(kind, 8080)) })
	whole("TCP behind hop-by-hop options", 0, func(kind string) []byte { return extension(unix.IPPROTO_TCP, tcp(kind, 8080)) })
	whole("TCP behind options and an authentication header", unix.IPPROTO_DSTOPTS, func(kind string) []byte {
		return extension(authentication, authenticated(unix.IPPROTO_TCP, tcp(kind, 80)))
	})
	for kind, first := range map[string]int{"TCP in fragments": 16, "TCP in a fragment too short for it": 8} {
		all[kind] = fragments6(src, dst, unix.IPPROTO_TCP, tcp(kind, 8080), first)
	}
	const kind = "TCP behind options that the first fragment does not end"
	long := join([]byte{unix.IPPROTO_TCP, 1, 1, 12}, make([]byte, 12), tcp(kind, 8080))
	all[kind] = fragments6(src, dst, unix.IPPROTO_DSTOPTS, long, 8)
	return all
}

// datagram is one of UDP from port 40000 to 53 without a checksum.
func datagram(text string) []byte {
	d := make([]byte, 8)
	binary.BigEndian.PutUint16(d, 40000)
	binary.BigEndian.PutUint16(d[2:], 53)
	binary.BigEndian.PutUint16(d[4:], uint16(8+len(text)))
	return append(d, text...)
}

// sendPackets sends raw packets from a pod; the kernel only routes them (raw(7), IPPROTO_RAW).
func (n *node) sendPackets(s *testbed.Sandbox, packets ...[]byte) {
	n.t.Helper()
	n.must(s.Netns.Do(func() error {
		for _, p := range packets {
			domain, to := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{Addr: [4]byte(p[16:20])})
			if p[0]>>4 == 6 {
				domain, to = unix.AF_INET6, &unix.SockaddrInet6{Addr: [16]byte(p[24:40])}
			}
			fd, err := unix.Socket(domain, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
			if err != nil {
				return err
			}
			err = unix.Sendto(fd, p, 0, to)
			unix.Close(fd)
			if err != nil {
				return fmt.Errorf("packet % x: %w", p[:min(len(p), 48)], err)
			}
		}
		return nil
	}))
}

// TestHiddenPackets: the guard drops packets that are not redirected and could hide a request,
// and packets with a source route, whose address changes behind the forward hook. The chain at
// postrouting alone does so, too: before any pod is redirected and after, and under another
// program's source NAT. The host's own requests pass.
func TestHiddenPackets(t *testing.T) {
	onThese(t, []setup{dual(bridgeIPTables), dual(bridged), dual(routedIPTables), dual(routed)}, func(t *testing.T, n *node) {
		aws := n.tapAt(n.AWS)
		for _, ns := range []*netnstest.Namespace{n.Node, n.AWS} {
			n.must(ns.Do(func() error { return acceptSourceRoutes() }))
		}
		n.onNode("ip address add " + second4.String() + "/32 dev lo")
		n.onNode("ip address add " + second6.String() + "/128 dev lo")
		round := func() { // netfilter's guard alone: the uplinks' has tests of its own
			n.round()
			n.unguardUplinks()
		}
		round()
		chain := n.SetChain()
		pod := n.pending("pod", "app")
		n.must(n.Add(t.Context(), pod))
		n.must(n.Node.Do(acceptSourceRoutes)) // by the pod's interface, too

		// send sends each kind, and then a packet that must arrive.
		send := func(round string) map[string]string {
			texts := make(map[string]string)
			for _, f := range fronts(pod) {
				text := func(kind string) string { return fmt.Sprintf("%s: %s of %d", round, kind, f.pod.BitLen()) }
				for kind, packets := range hidden(f.pod, f.service, text) {
					texts[text(kind)] = kind
					n.sendPackets(pod, packets...)
				}
				end, to := text("the end"), f.service // as a question of names
				if f.pod.Is6() {
					to = testbed.AWSIP6
				}
				n.sendPackets(pod, packet(f.pod, to, unix.IPPROTO_UDP, datagram(end)))
				n.eventually(func() bool { return aws.saw(end) })
			}
			return texts
		}
		wantNone := func(round string) {
			t.Helper()
			for text := range send(round) {
				if aws.saw(text) {
					t.Errorf("%s arrived", text)
				}
			}
			for _, from := range []netip.Addr{{}, second4} {
				n.wantHostAnswered(from, metadata)
			}
			for _, from := range []netip.Addr{{}, second6} {
				n.wantHostAnswered(from, "http://"+testbed.MetadataAddr6)
			}
		}
		change := func(chain, change string) {
			for _, family := range []string{"ip", "ip6"} {
				n.onNode(fmt.Sprintf("nft %s chain %s kube2iam-cni %s", change, family, chain))
			}
		}
		both := func(when string) {
			t.Helper()
			wantNone(when)
			change("guard", "delete")
			wantNone(when + ", by the guard at postrouting alone")
			round()
		}
		both("before a pod is redirected")
		n.SetChain(chain...)
		n.must(n.AddAgain(t.Context(), pod, pod.Result))
		both("redirected")
		// As bridge's ipMasq and kube-proxy do, in either way, and as early as the kernel takes a
		// chain of NAT.
		n.fromFile(`table ip masquerading { chain post { type nat hook postrouting priority -199; masquerade; }; }
table ip6 masquerading { chain post { type nat hook postrouting priority -199; masquerade; }; }`, "nft", "-f")
		both("masqueraded")

		// That they would arrive: by the source route past the guard in forward, and all of them
		// past none.
		if n.backend == "nftables" {
			change("guard-postrouting", "delete")
			n.eventually(func() bool {
				for text, kind := range send("without the guard at postrouting") {
					if kind == bySourceRoute {
						return aws.saw(text)
					}
				}
				return false
			})
			round()
		}
		n.SetChain()
		n.must(n.delOurs(pod))
		n.onNode("nft delete table ip masquerading")
		n.onNode("nft delete table ip6 masquerading")
		n.flushAll()
		for _, table := range []string{"nat", "mangle", "filter"} {
			n.onNode("ip6tables-legacy -t " + table + " -F")
		}
		for text := range send("without rules") {
			if !aws.saw(text) {
				t.Errorf("%s: did not arrive", text)
			}
		}
		n.IMDS.Reset()
		n.IMDS6.Reset()
	})
}

// The host's addresses besides that of its interface.
var second4, second6 = netip.MustParseAddr("10.201.0.250"), netip.MustParseAddr("fd00:201::250")

// wantHostAnswered wants the service to answer the host, which requests from an address of its
// loopback interface or from the address that the kernel chooses.
func (n *node) wantHostAnswered(from netip.Addr, url string) {
	n.t.Helper()
	dial := func(ctx context.Context, network, address string) (c net.Conn, err error) {
		err = n.Node.Do(func() error {
			var dialer net.Dialer
			if from.IsValid() {
				dialer.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0))
			}
			c, err = dialer.DialContext(ctx, network, address)
			return err
		})
		return c, err
	}
	client := http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}
	resp, err := client.Get(url + "/latest/meta-data/instance-id")
	n.must(err)
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		n.t.Errorf("the host asks %s: %s", url, resp.Status)
	}
}

// acceptSourceRoutes makes all interfaces of the thread's namespace accept source routes
// (Documentation/networking/ip-sysctl.rst, accept_source_route).
func acceptSourceRoutes() error {
	links, err := net.Interfaces()
	if err != nil {
		return err
	}
	names := []string{"all", "default"}
	for _, l := range links {
		names = append(names, l.Name)
	}
	for _, name := range names {
		if err := os.WriteFile("/proc/sys/net/ipv4/conf/"+name+"/accept_source_route", []byte("1"), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// TestIPVS: the endpoint of an IPVS service, kube-proxy's mode, is the metadata service. Its
// packets pass input and output and never forward. The control shows that they pass a guard in
// forward alone.
func TestIPVS(t *testing.T) {
	needIPVS(t)
	var all []setup
	for _, s := range setups {
		if s.primary != "calicolike" {
			all = append(all, dual(s))
		}
	}
	onThese(t, all, func(t *testing.T, n *node) {
		n.proxy(impatient...)
		pod := n.run("pod", "app")
		n.wantOwn(pod, "app")
		for _, command := range []string{
			"ip link add kube-ipvs0 type dummy", "ip link set kube-ipvs0 up",
			"ip address add 10.96.0.10/32 dev kube-ipvs0", "ip address add fd00:96::10/128 dev kube-ipvs0 nodad",
			"ipvsadm -A -t 10.96.0.10:80 -s rr", "ipvsadm -a -t 10.96.0.10:80 -r 169.254.169.254:80 -m",
			"ipvsadm -A -t [fd00:96::10]:80 -s rr", "ipvsadm -a -t [fd00:96::10]:80 -r [fd00:ec2::254]:80 -m",
		} {
			n.onNode(command)
		}
		n.must(n.Node.Do(func() error { return os.WriteFile("/proc/sys/net/ipv4/vs/conntrack", []byte("1"), 0o644) }))
		services := []string{"http://10.96.0.10", "http://[fd00:96::10]"}
		for _, url := range services {
			for _, got := range n.try(pod, url+credentials) {
				if got.err == nil {
					t.Errorf("%s by IPVS: %s", url, got)
				}
			}
		}
		n.wantOnlyTheNodeAsked()
		n.wantOwn(pod, "app")
		if n.backend != "nftables" {
			return
		}
		for _, family := range []string{"ip", "ip6"} {
			n.onNode("nft delete chain " + family + " kube2iam-cni guard-postrouting")
		}
		for _, url := range services {
			n.eventually(func() bool {
				return slices.ContainsFunc(n.try(pod, url+credentials), func(got answer) bool { return got.body == testbed.NodeRole })
			})
		}
		n.IMDS.Reset()
		n.IMDS6.Reset()
	})
}

// needIPVS skips a test if the kernel says that it has no IPVS.
func needIPVS(t *testing.T) {
	t.Helper()
	if _, err := netlink.GenlFamilyGet("IPVS"); errors.Is(err, unix.ENOENT) {
		t.Skipf("this kernel has no IPVS: %v", err)
	} else if err != nil {
		t.Fatal(err)
	}
	if err := testbed.Require("ipvsadm"); err != nil {
		t.Fatal(err)
	}
}
