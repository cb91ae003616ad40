package netns

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

var service6 = netip.MustParseAddrPort(testbed.MetadataAddr6).Addr()

// saw reports whether a frame with a text has arrived.
func (w *wire) saw(text string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, f := range w.seen {
		if bytes.Contains(f, []byte(text)) {
			return true
		}
	}
	return false
}

// segment is a TCP segment with a text and no checksum.
func segment(from, to uint16, text string) []byte {
	tcp := make([]byte, 20)
	binary.BigEndian.PutUint16(tcp, from)
	binary.BigEndian.PutUint16(tcp[2:], to)
	tcp[12], tcp[13] = 5<<4, 0x18 // header length; PSH, ACK
	return append(tcp, text...)
}

// packet is an IP packet of either family.
func packet(src, dst netip.Addr, protocol byte, payload []byte) []byte {
	if src.Is6() {
		header := []byte{0x60, 0, 0, 0, byte(len(payload) >> 8), byte(len(payload)), protocol, 64}
		return join(header, src.AsSlice(), dst.AsSlice(), payload)
	}
	header := make([]byte, 20)
	header[0], header[8], header[9] = 0x45, 64, protocol
	binary.BigEndian.PutUint16(header[2:], uint16(20+len(payload)))
	copy(header[12:], src.AsSlice())
	copy(header[16:], dst.AsSlice())
	var sum uint32
	for i := 0; i < len(header); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(header[i:]))
	}
	binary.BigEndian.PutUint16(header[10:], ^uint16(sum+sum>>16))
	return join(header, payload)
}

// disguises returns the ways to put a segment into a frame behind the MAC addresses. Its
// receiver finds it in each.
func disguises(src, dst netip.Addr, tcp []byte) map[string][]byte {
	plain := join([]byte{0x08, 0x00}, packet(src, dst, unix.IPPROTO_TCP, tcp))
	if src.Is6() {
		plain = join([]byte{0x86, 0xdd}, packet(src, dst, unix.IPPROTO_TCP, tcp))
	}
	of0 := []byte{0x81, 0, 0, 0} // IEEE 802.1Q, network 0
	all := map[string][]byte{
		"as it is":                     plain,
		"with a tag":                   join(of0, plain),
		"with two tags":                join(of0, of0, plain),
		"with three tags":              join(of0, of0, of0, plain),
		"with a service tag":           join([]byte{0x88, 0xa8, 0, 0}, plain),
		"with a tag and a service tag": join([]byte{0x88, 0xa8, 0, 0}, of0, plain),
		"with two service tags":        join([]byte{0x88, 0xa8, 0x20, 0}, []byte{0x88, 0xa8, 0xe0, 0}, plain),
	}
	if src.Is6() {
		first := func(next byte, payload []byte) []byte { // RFC 8200, 4.5: offset 0, more
			return join([]byte{0x86, 0xdd}, packet(src, dst, unix.IPPROTO_FRAGMENT, join([]byte{next, 0, 0, 1, 0, 0, 0, 7}, payload)))
		}
		all["in a fragment"] = first(unix.IPPROTO_TCP, tcp)
		// The TCP header would come in the next one.
		all["in a fragment behind options"] = first(unix.IPPROTO_DSTOPTS, join([]byte{unix.IPPROTO_TCP, 0, 1, 4, 0, 0, 0, 0}, tcp[20:]))
	}
	if dst == service || dst == service6 { // a pod takes no answer that it cannot authenticate
		kind := []byte{0x08, 0x00}
		if src.Is6() {
			kind = []byte{0x86, 0xdd}
		}
		all["with an authentication header"] = join(kind, packet(src, dst, authentication, authenticated(unix.IPPROTO_TCP, tcp)))
	}
	return all
}

// TestDisguisedFrames: a pod sends its neighbour frames from and to the metadata service's
// address that hide their content. None passes from port to port.
func TestDisguisedFrames(t *testing.T) {
	var dual []setup
	for _, s := range bridges {
		if s.noBridgeNF {
			s.ipv6 = true
			dual = append(dual, s)
		}
	}
	onThese(t, dual, func(t *testing.T, n *node) {
		victim, liar := n.run("victim", "app"), n.run("liar", "other")
		wire, its := n.tap(liar), n.tap(victim)
		send := func(round string) (sent []string) {
			say := func(how string, from, to netip.AddrPort) {
				text := func(what string) string {
					return fmt.Sprintf("%s: %s %s of %d", round, how, what, from.Addr().BitLen())
				}
				for what := range disguises(from.Addr(), to.Addr(), make([]byte, 20)) {
					frame := disguises(from.Addr(), to.Addr(), segment(from.Port(), to.Port(), text(what)))[what]
					wire.send(join(its.mac, wire.mac, frame))
					sent = append(sent, text(what))
				}
			}
			for _, given := range victim.Result.IPs {
				ip, _ := netip.AddrFromSlice(given.Address.IP)
				ip = ip.Unmap()
				service := netip.AddrPortFrom(service, 80)
				if ip.Is6() {
					service = netip.AddrPortFrom(service6, 80)
				}
				say("an answer", service, netip.AddrPortFrom(ip, 40000))
				say("a request", netip.AddrPortFrom(ip, 40000), service)
			}
			wire.send(join(its.mac, wire.mac, []byte{0x88, 0xb5}, []byte("the end of "+round), make([]byte, 46)))
			n.eventually(func() bool { return its.saw("the end of " + round) })
			return sent
		}
		for _, text := range send("guarded") {
			if its.saw(text) {
				t.Errorf("%s arrived", text)
			}
		}
		// That they would: without the rules each of them arrives.
		for _, chain := range []string{"prerouting", "forward", "guard"} {
			n.onNode("nft flush chain bridge kube2iam-cni " + chain)
		}
		for _, text := range send("without rules") {
			if !its.saw(text) {
				t.Errorf("%s did not arrive", text)
			}
		}
	})
}
