package netnstest

import (
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// Netns is a network namespace that lives as long as its test. Its methods fail the test. Its
// loopback interface is up, and duplicate address detection of IPv6 is off. Addresses that a test
// dials immediately need ip(8)'s "nodad": without it, the kernel validates them in the background.
type Netns struct {
	*Namespace
	t testing.TB
}

// New makes a network namespace. The caller stays in its own.
func New(t testing.TB) *Netns {
	t.Helper()
	if unavailable != nil {
		t.Skip(unavailable)
	}
	n, err := Create(func() error {
		if err := os.WriteFile("/proc/sys/net/ipv6/conf/default/accept_dad", []byte("0"), 0o644); err != nil {
			return err
		}
		return setLinkUp("lo")
	})
	if err != nil {
		t.Fatalf("%v (does TestMain call netnstest.Main?)", err)
	}
	t.Cleanup(func() { n.Close() })
	return &Netns{n, t}
}

func setLinkUp(name string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(link)
}

func (n *Netns) must(err error) {
	n.t.Helper()
	if err != nil {
		n.t.Fatal(err)
	}
}

// Enter binds the test's goroutine to a thread in the namespace. The thread ends with the test.
func (n *Netns) Enter() {
	n.t.Helper()
	runtime.LockOSThread()
	n.must(netns.Set(n.NsHandle))
}

// Do is Namespace.Do for a function that fails the test itself.
func (n *Netns) Do(f func()) {
	n.t.Helper()
	n.must(n.Namespace.Do(func() error {
		f()
		return nil
	}))
}

// Handle returns a netlink handle in the namespace.
func (n *Netns) Handle() *netlink.Handle {
	n.t.Helper()
	h, err := netlink.NewHandleAt(n.NsHandle)
	n.must(err)
	n.t.Cleanup(h.Close)
	return h
}

// IP runs commands of ip(8) in the namespace, without the word "ip".
func (n *Netns) IP(commands ...string) {
	n.t.Helper()
	n.batch(strings.Join(commands, "\n"), "ip", "-batch", "-")
}

// NFT runs a script of nft(8) in the namespace, as one transaction.
func (n *Netns) NFT(script string) {
	n.t.Helper()
	n.batch(script, "nft", "-f", "-")
}

func (n *Netns) batch(input, name string, args ...string) {
	n.t.Helper()
	n.Do(func() {
		cmd := exec.Command(name, args...)
		cmd.Stdin = strings.NewReader(input)
		if out, err := cmd.CombinedOutput(); err != nil {
			n.t.Fatalf("%s: %v\n%s\n%s", name, err, input, out)
		}
	})
}

// Run runs a shell command in the namespace and returns its standard output.
func (n *Netns) Run(command string) string {
	n.t.Helper()
	var stdout, stderr strings.Builder
	n.Do(func() {
		cmd := exec.Command("sh", "-c", command)
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		if err := cmd.Run(); err != nil {
			n.t.Fatalf("%s: %v\n%s", command, err, stderr.String())
		}
	})
	return stdout.String()
}

// Sysctl sets a kernel parameter of the namespace, whose name is a path below /proc/sys.
func (n *Netns) Sysctl(name, value string) {
	n.t.Helper()
	n.must(n.Namespace.Do(func() error { return os.WriteFile("/proc/sys/"+name, []byte(value), 0o644) }))
}

// Veth makes a pair of interfaces: name, which is up, and peerName in another namespace, which is
// down.
func (n *Netns) Veth(name string, peer *Netns, peerName string) (link netlink.Link) {
	n.t.Helper()
	return n.add(&netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: peerName, PeerNamespace: netlink.NsFd(peer.NsHandle),
	})
}

// Bridge makes a bridge, which is up.
func (n *Netns) Bridge(name string) netlink.Link {
	n.t.Helper()
	return n.add(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name}})
}

func (n *Netns) add(l netlink.Link) (link netlink.Link) {
	n.t.Helper()
	n.must(n.Namespace.Do(func() (err error) {
		if err = netlink.LinkAdd(l); err != nil {
			return err
		}
		if link, err = netlink.LinkByName(l.Attrs().Name); err != nil {
			return err
		}
		return netlink.LinkSetUp(link)
	}))
	return link
}

// Listen listens in the namespace until the test ends.
func (n *Netns) Listen(network, address string) net.Listener {
	n.t.Helper()
	l, err := n.Namespace.Listen(network, address)
	n.must(err)
	n.t.Cleanup(func() { l.Close() })
	return l
}
