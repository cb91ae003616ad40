package hostlink

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
)

// flood adds count addresses of 2001:db8::/32 or 10.0.0.0/8 to an interface of the pod.
func (n *node) flood(ifName string, family, count int) {
	n.Helper()
	link, err := n.inPod.LinkByName(ifName)
	n.must(err)
	for i := range count {
		ip, bits := net.IPv4(10, byte(i>>16), byte(i>>8), byte(i)).To4(), 32
		if family == 6 {
			ip, bits = net.ParseIP(fmt.Sprintf("2001:db8::%x:%x", i>>16, i&0xffff)), 128
		}
		n.must(n.inPod.AddrAdd(link, &netlink.Addr{IPNet: &net.IPNet{IP: ip, Mask: net.CIDRMask(bits, bits)}, Flags: 0x02 /* IFA_F_NODAD */}))
	}
}

// TestAddressesAreBounded adds many addresses to a pod's interface, or to another one of the pod.
// The error is ErrAddresses if the interface itself has more than maxAddresses.
func TestAddressesAreBounded(t *testing.T) {
	const many = 5000
	own := []string{"10.1.0.5/24", "fd00:1::5/64"}
	want := []netip.Addr{netip.MustParseAddr("10.1.0.5"), netip.MustParseAddr("fd00:1::5")}
	for name, tc := range map[string]struct {
		ifName        string
		family, extra int
		want          []netip.Addr
		err           error
		whole         bool
	}{
		"its own IPv4":             {ifName: "eth0", family: 4, extra: many, err: ErrAddresses},
		"its own IPv6":             {ifName: "eth0", family: 6, extra: many, err: ErrAddresses},
		"another interface's IPv4": {ifName: "net1", family: 4, extra: many, want: want},
		"another interface's IPv6": {ifName: "net1", family: 6, extra: many, want: want},
		"maxAddresses of IPv4":     {ifName: "eth0", family: 4, extra: maxAddresses - len(own), whole: true},
		"one more of IPv4":         {ifName: "eth0", family: 4, extra: maxAddresses - len(own) + 1, err: ErrAddresses},
		"maxAddresses of IPv6":     {ifName: "eth0", family: 6, extra: maxAddresses - len(own), whole: true},
		"one more of IPv6":         {ifName: "eth0", family: 6, extra: maxAddresses - len(own) + 1, err: ErrAddresses},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			n.host.Veth("veth0", n.pod, "eth0")
			n.host.Veth("veth1", n.pod, "net1")
			for _, cidr := range own {
				n.addr(n.inPod, "eth0", cidr)
			}
			n.flood(tc.ifName, tc.family, tc.extra)
			files := openFiles(t)
			got, err := Addresses(n.pod.Path(), "eth0")
			if !errors.Is(err, tc.err) {
				t.Fatalf("got the error %v, want %v", err, tc.err)
			}
			if tc.whole {
				if len(got) != maxAddresses {
					t.Errorf("got %d addresses", len(got))
				}
			} else if diff := cmp.Diff(tc.want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
				t.Error(diff)
			}
			if _, err := Find(n.pod.Path(), "eth0"); !errors.Is(err, tc.err) {
				t.Errorf("Find: %v, want %v", err, tc.err)
			}
			if left := openFiles(t); left != files {
				t.Errorf("%d files are open, %d before", left, files)
			}
		})
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(files)
}
