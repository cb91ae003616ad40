package attach

import (
	"net/netip"
	"testing"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/rules"
	"github.com/kube2iam-cni/kube2iam-cni/test/netnstest"
	"github.com/kube2iam-cni/kube2iam-cni/test/testhost"
)

const testMark = 0x1000

var services = []netip.AddrPort{netip.MustParseAddrPort("169.254.169.254:80"), netip.MustParseAddrPort("[fd00:ec2::254]:80")}

func TestMain(m *testing.M) { netnstest.Main(m) }

// bed is a Node on a fake host.
type bed struct {
	*testhost.Fake
	*Node
}

func newBed(t *testing.T, backend string) *bed {
	t.Helper()
	f := testhost.NewFake(t)
	settings := Settings{
		ProxyPort: 8181, MetadataIP: services[0].Addr(), StateDir: f.StateDir, Backend: backend, Guard: true, Mark: testMark,
	}
	system := System{
		FindLink:       f.FindLink,
		NodeIP:         testhost.NodeIP,
		HasIPv6:        func() bool { return true },
		IPTablesDirs:   rules.IPTablesDirs(),
		Now:            func() time.Time { return time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC) },
		DestroySockets: f.DestroySockets,
		DropQueued:     f.DropQueued,
	}
	b := &bed{f, New(settings, system, f.Logger)}
	t.Cleanup(b.Close)
	return b
}

// pod adds a pod with a routed veth, and returns the request of its ADD.
func (b *bed) pod(id string, index int, ips ...string) Request {
	netns, addrs := b.AddPod(id, index, ips...)
	return Request{ContainerID: id, IfName: "eth0", Netns: netns, Network: "net", Pod: attachment.Pod{Namespace: "team", Name: id}, IPs: addrs}
}

func (b *bed) attached(r Request) Request {
	b.Helper()
	_, err := b.Attach(b.Context(), r)
	b.Must(err)
	return r
}
