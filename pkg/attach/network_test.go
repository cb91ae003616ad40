package attach

import (
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/vishvananda/netns"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
)

// network is a host and others, each in a network namespace that lives as long as the test. The test's thread is in the
// host's.
type network struct {
	*testing.T
	host netns.NsHandle
}

// newNetwork makes the host. It needs root.
func newNetwork(t *testing.T) *network {
	t.Helper()
	runtime.LockOSThread()
	t.Setenv("XTABLES_LOCKFILE", filepath.Join(t.TempDir(), "xtables.lock"))
	n := &network{T: t}
	n.host = n.namespace()
	return n
}

func (n *network) must(err error) {
	n.Helper()
	if err != nil {
		n.Fatal(err)
	}
}

// namespace makes one more. Its addresses are there at once, and not after others were asked whether they are theirs.
func (n *network) namespace() netns.NsHandle {
	n.Helper()
	ns, err := netns.New()
	if err != nil {
		n.Fatalf("new network namespace (these tests need root): %v", err)
	}
	n.Cleanup(func() { ns.Close() })
	n.must(os.WriteFile("/proc/sys/net/ipv6/conf/default/accept_dad", []byte("0"), 0o644))
	n.run("ip link set lo up")
	if n.host != 0 {
		n.must(netns.Set(n.host))
	}
	return ns
}

// path leads to a namespace.
func path(ns netns.NsHandle) string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), int(ns)) }

// in does something in a namespace.
func (n *network) in(ns netns.NsHandle, do func()) {
	n.Helper()
	n.must(netns.Set(ns))
	defer func() { n.must(netns.Set(n.host)) }()
	do()
}

// run runs commands where the thread is, a line each.
func (n *network) run(commands string) (out string) {
	n.Helper()
	for command := range strings.Lines(commands) {
		words := strings.Fields(command)
		if len(words) == 0 {
			continue
		}
		all, err := exec.Command(words[0], words[1:]...).CombinedOutput()
		if err != nil {
			n.Fatalf("%s: %v\n%s", command, err, all)
		}
		out += string(all)
	}
	return out
}

// real returns the node of these namespaces, with the real operating system but for the node's address.
func (n *network) real(backend string) *Node {
	system := Host()
	system.NodeIP = nodeIP
	node := New(Settings{ProxyPort: 8181, MetadataIP: services[0].Addr(), StateDir: filepath.Join(n.TempDir(), "state"), Backend: backend,
		Guard: true, Mark: testMark}, system, slog.New(slog.DiscardHandler))
	n.Cleanup(node.Close)
	return node
}

// request is what an ADD asks of a pod.
func request(pod netns.NsHandle, ips ...string) Request {
	r := Request{ContainerID: "c1", IfName: "eth0", Netns: path(pod), Network: "net", Pod: attachment.Pod{Namespace: "team", Name: "c1"}}
	for _, ip := range ips {
		r.IPs = append(r.IPs, netip.MustParseAddr(ip))
	}
	return r
}
