package hostlink

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TestLinks replaces and renames a veth: the name is reused, the index is not.
func TestLinks(t *testing.T) {
	n := newNode(t)
	names := func() map[int]string {
		t.Helper()
		links, err := Links()
		n.must(err)
		return links
	}
	want := names()
	if want[1] != "lo" {
		t.Errorf("got %v, want lo with the index 1", want)
	}
	first := n.host.Veth("veth0", n.pod, "eth0")
	want[first.Attrs().Index] = "veth0"
	bridge := n.host.Bridge("br0")
	want[bridge.Attrs().Index] = "br0"
	if diff := cmp.Diff(want, names()); diff != "" {
		t.Errorf("with a veth and a bridge:\n%s", diff)
	}

	n.must(netlink.LinkDel(first))
	second := n.host.Veth("veth0", n.pod, "eth0")
	if second.Attrs().Index == first.Attrs().Index {
		t.Errorf("the second veth0 has the index of the first, %d", first.Attrs().Index)
	}
	delete(want, first.Attrs().Index)
	want[second.Attrs().Index] = "veth0"
	if diff := cmp.Diff(want, names()); diff != "" {
		t.Errorf("with a second veth of that name:\n%s", diff)
	}

	n.must(netlink.LinkSetDown(second))
	n.must(netlink.LinkSetName(second, "veth1"))
	want[second.Attrs().Index] = "veth1"
	if diff := cmp.Diff(want, names()); diff != "" {
		t.Errorf("renamed:\n%s", diff)
	}
}

func TestAddresses(t *testing.T) {
	n := newNode(t)
	n.host.Veth("veth0", n.pod, "eth0")
	n.host.Veth("veth1", n.pod, "net1")
	for ifName, cidrs := range map[string][]string{"eth0": {"10.1.0.5/24", "10.1.0.6/32", "fd00:1::5/64", "fe80::5/64"}, "net1": {"10.2.0.5/24"}} {
		for _, cidr := range cidrs {
			n.addr(n.inPod, ifName, cidr)
		}
	}
	onHost, err := netlink.LinkByName("veth0")
	n.must(err)
	hostIP, err := netlink.ParseAddr("10.3.0.1/24")
	n.must(err)
	n.must(netlink.AddrAdd(onHost, hostIP))
	pod := n.pod.Path()
	file := filepath.Join(t.TempDir(), "netns")
	n.must(os.WriteFile(file, nil, 0o444))
	for name, tc := range map[string]struct {
		path, ifName, ip string
		want             bool
	}{
		"its first address":                  {pod, "eth0", "10.1.0.5", true},
		"its second address":                 {pod, "eth0", "10.1.0.6", true},
		"its IPv6 address":                   {pod, "eth0", "fd00:1::5", true},
		"an address of another interface":    {pod, "eth0", "10.2.0.5", false},
		"an address of the second interface": {pod, "net1", "10.2.0.5", true},
		"an address of no interface":         {pod, "eth0", "10.1.0.7", false},
		"the address of the network":         {pod, "eth0", "10.1.0.0", false},
		"a link-local address":               {pod, "eth0", "fe80::5", false},
		"a loopback address":                 {pod, "lo", "127.0.0.1", false},
		"no such interface":                  {pod, "eth1", "10.1.0.5", false},
		"the name of the host side":          {pod, "veth0", "10.1.0.5", false},
		"the host's own namespace":           {"/proc/thread-self/ns/net", "veth0", "10.3.0.1", false},
		"a path that does not exist":         {filepath.Join(t.TempDir(), "none"), "eth0", "10.1.0.5", false},
		"an empty path":                      {"", "eth0", "10.1.0.5", false},
		"a file that is not a namespace":     {file, "eth0", "10.1.0.5", false},
	} {
		ips, err := Addresses(tc.path, tc.ifName)
		if got := slices.Contains(ips, netip.MustParseAddr(tc.ip)); got != tc.want || err != nil {
			t.Errorf("%s: got %v, %v", name, ips, err)
		}
	}

	eth0, err := n.inPod.LinkByName("eth0")
	n.must(err)
	n.must(n.inPod.LinkDel(eth0))
	if ips, err := Addresses(pod, "eth0"); len(ips) > 0 || err != nil {
		t.Errorf("a removed interface: got %v, %v", ips, err)
	}

	// An interface that cannot be read is an error, not an interface without addresses.
	var limit unix.Rlimit
	n.must(unix.Getrlimit(unix.RLIMIT_NOFILE, &limit))
	n.must(unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 0, Max: limit.Max}))
	ips, err := Addresses(pod, "net1")
	n.must(unix.Setrlimit(unix.RLIMIT_NOFILE, &limit))
	if err == nil {
		t.Errorf("without a file descriptor: %v, and no error", ips)
	}
}
