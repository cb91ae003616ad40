package attach

import (
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/hostlink"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/ipfamily"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/rules"
	"github.com/kube2iam-cni/kube2iam-cni/test/netnstest"
	"github.com/kube2iam-cni/kube2iam-cni/test/ruleset"
)

const testMark = 0x1000

var services = []netip.AddrPort{netip.MustParseAddrPort("169.254.169.254:80"), netip.MustParseAddrPort("[fd00:ec2::254]:80")}

func nodeIP(f ipfamily.Family) (netip.Addr, error) {
	return map[ipfamily.Family]netip.Addr{ipfamily.IPv4: netip.MustParseAddr("192.168.7.2"), ipfamily.IPv6: netip.MustParseAddr("fd00:7::2")}[f], nil
}

// backends runs a test once with each backend.
func backends(t *testing.T, test func(*testing.T, string)) {
	for _, backend := range []string{"nftables", "iptables"} {
		t.Run(backend, func(t *testing.T) { test(t, backend) })
	}
}

// bed is a node with real rules and records, in a network namespace and a directory of the test, and with
// fake interfaces.
type bed struct {
	*testing.T
	*Node
	pods       map[string]*hostlink.Link // the eth0 of each pod, by the path of its network namespace
	destroyed  []string                  // the calls of DestroySockets, with the records at that time, and of DropQueued
	destroyErr error
	output     strings.Builder // the log
}

func TestMain(m *testing.M) { netnstest.Main(m) }

func newBed(t *testing.T, backend string) *bed {
	t.Helper()
	netnstest.New(t).Enter()
	b := &bed{T: t, pods: make(map[string]*hostlink.Link)}
	settings := Settings{
		ProxyPort: 8181, MetadataIP: services[0].Addr(), StateDir: filepath.Join(t.TempDir(), "state"),
		Backend: backend, Guard: true, Mark: testMark,
	}
	system := System{
		FindLink: func(netnsPath, ifName string) (*hostlink.Link, error) {
			if pod := b.pods[netnsPath]; pod != nil && ifName == "eth0" {
				return pod, nil
			}
			return nil, hostlink.ErrNetns
		},
		NodeIP:       nodeIP,
		HasIPv6:      func() bool { return true },
		IPTablesDirs: rules.IPTablesDirs(),
		Now:          func() time.Time { return time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC) },
		DestroySockets: func(ports []uint16, peers []netip.Addr) func() (int, error) {
			b.destroyed = append(b.destroyed, fmt.Sprint(ports, peers, b.recorded()))
			return func() (int, error) { return 1, b.destroyErr }
		},
		DropQueued: func(ip netip.Addr) error {
			b.destroyed = append(b.destroyed, fmt.Sprint("queued for ", ip))
			return nil
		},
	}
	b.Node = New(settings, system, slog.New(slog.NewTextHandler(&b.output, nil)))
	t.Cleanup(b.Close)
	return b
}

func (b *bed) must(err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}

// pod adds a pod with a routed veth, and returns the request of its ADD.
func (b *bed) pod(id string, index int, ips ...string) Request {
	b.Helper()
	r := Request{ContainerID: id, IfName: "eth0", Netns: "/netns/" + id, Network: "net", Pod: attachment.Pod{Namespace: "team", Name: id}}
	for _, ip := range ips {
		r.IPs = append(r.IPs, netip.MustParseAddr(ip))
	}
	b.pods[r.Netns] = &hostlink.Link{Name: fmt.Sprintf("veth%d", index), Index: index, IPs: r.IPs}
	return r
}

func (b *bed) attached(r Request) Request {
	b.Helper()
	_, err := b.Attach(b.Context(), r)
	b.must(err)
	return r
}

// recorded returns the identities of the records.
func (b *bed) recorded() []string {
	b.Helper()
	records, err := b.Records.List()
	b.must(err)
	var ids []string
	for _, r := range records {
		ids = append(ids, r.ID())
	}
	return ids
}

// allRules returns all rules of the namespace, sorted.
func (b *bed) allRules() string {
	b.Helper()
	lines, err := ruleset.All()
	b.must(err)
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// log returns the log since the last call.
func (b *bed) log() string {
	output := b.output.String()
	b.output.Reset()
	return output
}
