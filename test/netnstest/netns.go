package netnstest

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// Netns is a network namespace that lives as long as its test. Its loopback interface is up, and
// duplicate address detection of IPv6 is off. Addresses that a test dials immediately still need
// ip(8)'s "nodad": without it, the kernel validates them in the background.
type Netns struct {
	netns.NsHandle
	t testing.TB
}

// New makes a network namespace. The caller stays in its own.
func New(t testing.TB) *Netns {
	t.Helper()
	if unavailable != nil {
		t.Skip(unavailable)
	}
	n := &Netns{NsHandle: netns.None(), t: t}
	made := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		var err error
		if n.NsHandle, err = netns.New(); err == nil {
			err = os.WriteFile("/proc/sys/net/ipv6/conf/default/accept_dad", []byte("0"), 0o644)
		}
		if err == nil {
			err = setLinkUp("lo")
		}
		made <- err
	}()
	err := <-made
	t.Cleanup(func() { n.Close() })
	if err != nil {
		t.Fatalf("new network namespace: %v (does TestMain call netnstest.Main?)", err)
	}
	return n
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

// Path returns a path to the namespace, as CNI_NETNS has one.
func (n *Netns) Path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), int(n.NsHandle)) }

// Enter binds the test's goroutine to a thread in the namespace. The thread ends with the test.
func (n *Netns) Enter() {
	n.t.Helper()
	runtime.LockOSThread()
	n.must(netns.Set(n.NsHandle))
}

// Do calls f in the namespace: sockets that f opens and processes that it starts stay there.
// Goroutines that f starts are not in it.
func (n *Netns) Do(f func()) {
	n.t.Helper()
	runtime.LockOSThread()
	before, err := netns.Get()
	n.must(err)
	defer before.Close()
	n.must(netns.Set(n.NsHandle))
	defer func() {
		if err := netns.Set(before); err != nil {
			panic(err) // the thread stays locked, so that no other goroutine runs in a wrong namespace
		}
		runtime.UnlockOSThread()
	}()
	f()
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
	n.Do(func() {
		batch := exec.Command("ip", "-batch", "-")
		batch.Stdin = strings.NewReader(strings.Join(commands, "\n"))
		if out, err := batch.CombinedOutput(); err != nil {
			n.t.Fatalf("ip: %v\n%s\n%s", err, strings.Join(commands, "\n"), out)
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
	n.Do(func() { n.must(os.WriteFile("/proc/sys/"+name, []byte(value), 0o644)) })
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
	n.Do(func() {
		n.must(netlink.LinkAdd(l))
		var err error
		link, err = netlink.LinkByName(l.Attrs().Name)
		n.must(err)
		n.must(netlink.LinkSetUp(link))
	})
	return link
}

// Listen listens in the namespace until the test ends.
func (n *Netns) Listen(network, address string) (l net.Listener) {
	n.t.Helper()
	n.Do(func() {
		var err error
		l, err = net.Listen(network, address)
		n.must(err)
	})
	n.t.Cleanup(func() { l.Close() })
	return l
}
