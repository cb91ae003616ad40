package testhost

import (
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/hostlink"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/ipfamily"
	"github.com/kube2iam-cni/kube2iam-cni/test/netnstest"
	"github.com/kube2iam-cni/kube2iam-cni/test/ruleset"
)

// Fake is a host with real rules and records, in a network namespace and a directory of the test,
// and with fake interfaces and sockets. The test runs in the namespace.
type Fake struct {
	*testing.T
	StateDir   string
	Pods       map[string]*hostlink.Link // the eth0 of each pod, by the path of its network namespace
	Destroyed  []string                  // the calls of DestroySockets, with the records at that time, and of DropQueued
	DestroyErr error
	Logger     *slog.Logger
	output     strings.Builder
}

// NewFake makes a host without pods. TestMain must call netnstest.Main.
func NewFake(t *testing.T) *Fake {
	t.Helper()
	netnstest.New(t).Enter()
	f := &Fake{T: t, StateDir: filepath.Join(t.TempDir(), "state"), Pods: make(map[string]*hostlink.Link)}
	f.Logger = slog.New(slog.NewTextHandler(&f.output, nil))
	return f
}

func (f *Fake) Must(err error) {
	f.Helper()
	if err != nil {
		f.Fatal(err)
	}
}

// AddPod adds a pod with a routed veth and returns the path of its network namespace.
func (f *Fake) AddPod(id string, index int, ips ...string) (netns string, addrs []netip.Addr) {
	for _, ip := range ips {
		addrs = append(addrs, netip.MustParseAddr(ip))
	}
	netns = "/netns/" + id
	f.Pods[netns] = &hostlink.Link{Name: fmt.Sprintf("veth%d", index), Index: index, IPs: addrs}
	return netns, addrs
}

// FindLink returns the eth0 of a pod.
func (f *Fake) FindLink(netnsPath, ifName string) (*hostlink.Link, error) {
	if pod := f.Pods[netnsPath]; pod != nil && ifName == "eth0" {
		return pod, nil
	}
	return nil, hostlink.ErrNetns
}

// NodeIP returns the node's address of a family.
func NodeIP(f ipfamily.Family) (netip.Addr, error) {
	return map[ipfamily.Family]netip.Addr{ipfamily.IPv4: netip.MustParseAddr(Uplink4), ipfamily.IPv6: netip.MustParseAddr(Uplink6)}[f], nil
}

// DestroySockets records its call.
func (f *Fake) DestroySockets(ports []uint16, peers []netip.Addr) func() (int, error) {
	f.Destroyed = append(f.Destroyed, fmt.Sprint(ports, peers, f.Recorded()))
	return func() (int, error) { return 1, f.DestroyErr }
}

// DropQueued records its call.
func (f *Fake) DropQueued(ip netip.Addr) error {
	f.Destroyed = append(f.Destroyed, fmt.Sprint("queued for ", ip))
	return nil
}

// WantDestroyed compares the calls of DestroySockets and DropQueued since its last call.
func (f *Fake) WantDestroyed(when string, want ...string) {
	f.Helper()
	if diff := cmp.Diff(want, f.Destroyed); diff != "" {
		f.Errorf("%s, sockets destroyed (-want +got):\n%s", when, diff)
	}
	f.Destroyed = nil
}

// Recorded returns the identities of the records.
func (f *Fake) Recorded() []string {
	f.Helper()
	records, err := attachment.In(f.StateDir).List()
	f.Must(err)
	var ids []string
	for _, r := range records {
		ids = append(ids, r.ID())
	}
	return ids
}

// AllRules returns all rules of the host, sorted.
func (f *Fake) AllRules() string {
	f.Helper()
	lines, err := ruleset.All()
	f.Must(err)
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// Logged returns the log since its last call.
func (f *Fake) Logged() string {
	output := f.output.String()
	f.output.Reset()
	return output
}

// Backends runs a test once with each backend.
func Backends(t *testing.T, test func(t *testing.T, backend string)) {
	for _, backend := range []string{"nftables", "iptables"} {
		t.Run(backend, func(t *testing.T) { test(t, backend) })
	}
}
