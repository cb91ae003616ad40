package attach

import (
	"log/slog"
	"net/netip"
	"path/filepath"
	"testing"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/test/netnstest"
	"github.com/kube2iam-cni/kube2iam-cni/test/testhost"
)

// newHost makes the network namespace of a host. The test runs in it.
func newHost(t *testing.T) *netnstest.Netns {
	t.Helper()
	host := netnstest.New(t)
	host.Enter()
	return host
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// realNode returns a node with the real operating system except for the node's address.
func realNode(t *testing.T, backend string) *Node {
	system := Host()
	system.NodeIP = testhost.NodeIP
	node := New(Settings{
		ProxyPort: 8181, MetadataIP: services[0].Addr(), StateDir: filepath.Join(t.TempDir(), "state"), Backend: backend,
		Guard: true, Mark: testMark,
	}, system, slog.New(slog.DiscardHandler))
	t.Cleanup(node.Close)
	return node
}

// request returns the request of a pod's ADD.
func request(pod *netnstest.Netns, ips ...string) Request {
	r := Request{ContainerID: "c1", IfName: "eth0", Netns: pod.Path(), Network: "net", Pod: attachment.Pod{Namespace: "team", Name: "c1"}}
	for _, ip := range ips {
		r.IPs = append(r.IPs, netip.MustParseAddr(ip))
	}
	return r
}
