package agent

import (
	"context"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/hostlink"
)

// unlocked fails the test if the exclusive lock is held.
func (b *bed) unlocked(what string) {
	b.Helper()
	ctx, cancel := context.WithCancel(b.Context())
	cancel()
	unlock, err := b.node.Records.LockShared(ctx)
	if err != nil {
		b.Errorf("%s while the lock is held: %v", what, err)
		return
	}
	unlock()
}

// TestPodsAreEnteredWithoutTheLock has rounds adopt, repair and collect pods without a veth. ADDs
// wait for the lock, so no pod may decide how long it is held.
func TestPodsAreEnteredWithoutTheLock(t *testing.T) {
	b := newBed(t, "nftables")
	looks, adds := 0, 0
	addresses := func(inner func(string, string) ([]netip.Addr, error)) func(string, string) ([]netip.Addr, error) {
		return func(netnsPath, ifName string) ([]netip.Addr, error) {
			looks++
			b.unlocked("addresses are read")
			return inner(netnsPath, ifName)
		}
	}
	b.Addresses = addresses(b.Addresses)
	path, rules := b.macvlan("c1", "10.1.0.5")
	find := b.node.FindLink
	b.node.FindLink = func(netnsPath, ifName string) (*hostlink.Link, error) {
		b.unlocked("an interface is looked for")
		return find(netnsPath, ifName)
	}
	side := b.HostSide
	b.HostSide = func(netnsPath, ifName string) string {
		b.unlocked("the host side of an interface is looked for")
		return side(netnsPath, ifName)
	}
	add := b.attachPod
	b.attachPod = func(ctx context.Context, r *attachment.Record) error {
		adds++
		b.unlocked("a redirection is made in a pod")
		return add(ctx, r)
	}
	for _, step := range []struct {
		what    string
		do      func()
		records string
		adds    int
	}{
		{"adopted", func() {}, "c1@eth0", 1},
		{"repaired", func() { b.run("nft flush ruleset") }, "c1@eth0", 0},
		{"repaired in the pod", func() { rules("flush ruleset") }, "c1@eth0", 1},
		{"collected", func() { b.Pods[path].IPs = nil }, "", 0},
	} {
		looks, adds = 0, 0
		step.do()
		b.round()
		if got := strings.Join(b.Recorded(), " "); got != step.records || looks == 0 || adds != step.adds {
			t.Errorf("%s: records %q after %d looks, and %d redirections in pods", step.what, got, looks, adds)
		}
	}
	if left := rules(); strings.Contains(left, "c1@eth0") {
		t.Errorf("in the pod there is\n%s", left)
	}
}

// TestChangeBetweenSnapshotAndLock has an attachment without a veth that is gone in the first
// snapshot, and changes before the agent has the lock.
func TestChangeBetweenSnapshotAndLock(t *testing.T) {
	for name, tc := range map[string]struct {
		do      func(*bed, *attachment.Record) error
		records string
	}{
		"nothing":       {func(*bed, *attachment.Record) error { return nil }, ""},
		"its DEL comes": {func(b *bed, r *attachment.Record) error { return b.node.Detach(b.Context(), r.ContainerID, r.IfName) }, ""},
		"its ADD comes": {func(b *bed, r *attachment.Record) error {
			r.Created = r.Created.Add(1)
			return b.node.Records.Put(r)
		}, "c1@eth0"},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBed(t, "nftables")
			path, _ := b.macvlan("c1", "10.1.0.5")
			b.round()
			r, err := b.node.Records.Get("c1", "eth0")
			b.Must(err)
			b.Must(os.RemoveAll(b.Cache.Dir)) // no round adopts it again
			b.Pods[path].IPs = nil
			addresses := b.Addresses
			b.Addresses = func(netnsPath, ifName string) ([]netip.Addr, error) {
				held, err := addresses(netnsPath, ifName)
				b.Must(tc.do(b, r))
				return held, err
			}
			b.round()
			if got := strings.Join(b.Recorded(), " "); got != tc.records {
				t.Errorf("records %q, want %q", got, tc.records)
			}
		})
	}
}

// TestAdoptTakesNoVethForAnotherInterface has a pod with NET_ADMIN put another interface of its
// name in the place of its veth, between the look at the cache and the adoption: its redirection
// would be made inside the pod, and its address bound to no link.
func TestAdoptTakesNoVethForAnotherInterface(t *testing.T) {
	for name, now := range map[string]func(*hostlink.Link) (*hostlink.Link, error){
		"a dummy interface": func(pod *hostlink.Link) (*hostlink.Link, error) {
			return nil, &hostlink.UnsupportedError{IfName: "eth0", Kind: "dummy", Reason: "it is a dummy", IPs: pod.IPs}
		},
		"another veth": func(pod *hostlink.Link) (*hostlink.Link, error) {
			return &hostlink.Link{Name: "veth8", Index: 8, IPs: pod.IPs}, nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBed(t, "nftables")
			r := b.pod("c1", 7, "10.1.0.5")
			b.links[8] = "veth8"
			b.cached("c1", cacheEntryOf("c1", r.Netns, result("1.1.0", "10.1.0.5")))
			find := b.node.FindLink
			b.node.FindLink = func(netnsPath, _ string) (*hostlink.Link, error) { return now(b.Pods[netnsPath]) }
			b.round()
			if recorded := b.Recorded(); len(recorded) > 0 {
				t.Errorf("it was adopted: %v", recorded)
			}
			if logged := b.Logged(); !strings.Contains(logged, "A pod was not adopted") || !strings.Contains(logged, "cache names") {
				t.Errorf("the log is %s", logged)
			}
			b.node.FindLink = find
			b.round()
			if got := strings.Join(b.Recorded(), " "); got != "c1@eth0" {
				t.Errorf("with its own interface: records %q", got)
			}
		})
	}
}

// TestAdoptOfAVethInsideThePod has a veth whose host side is a port of Open vSwitch: it is adopted
// as the cache calls it, and gone with its host side.
func TestAdoptOfAVethInsideThePod(t *testing.T) {
	b := newBed(t, "nftables")
	path, _ := b.macvlan("c1", "10.1.0.5")
	b.node.PodDatapath = true
	b.cached("c1", cacheEntryOf("c1", path, result("1.1.0", "10.1.0.5")))
	b.Pods[path].Name, b.links[7] = hostLink, hostLink
	b.node.FindLink = func(string, string) (*hostlink.Link, error) {
		return nil, &hostlink.UnsupportedError{IfName: "eth0", Kind: "veth", Reason: "a port of ovs-system", IPs: b.Pods[path].IPs, HostLink: hostLink, HostIndex: 7}
	}
	b.round()
	want := attachment.HostLink{Name: hostLink, Index: 7}
	if r, err := b.node.Records.Get("c1", "eth0"); err != nil || r.Datapath != attachment.DatapathPod || r.HostLink != want {
		t.Errorf("got %+v, %v", r, err)
	}
	b.Must(os.RemoveAll(b.Cache.Dir))
	delete(b.links, 7)
	b.round()
	if recorded := b.Recorded(); len(recorded) > 0 {
		t.Errorf("without its host side: %v", recorded)
	}
}
