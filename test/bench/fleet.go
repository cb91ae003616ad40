package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/vishvananda/netlink"

	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

// fleet is pods of a node that share a network namespace: the plugin and the agent see a pod's
// veth, its addresses and its record, and a namespace for each would take minutes. The host sides
// are ports of a bridge, which need more rules than routed ones. No link is up, because no packet
// is sent.
type fleet struct {
	calls  caller
	entry  testbed.Entry
	shared *testbed.Sandbox
	bridge int
	pods   []pod
	nextIP netip.Addr
}

// newFleet prepares pods that grow attaches by the plugin entry. Their addresses begin with first.
func newFleet(calls caller, entry testbed.Entry, first netip.Addr) (*fleet, error) {
	shared, err := calls.bed.NewSandbox("default", "fleet", "fleet")
	if err != nil {
		return nil, err
	}
	f := &fleet{calls: calls, entry: entry, shared: shared, nextIP: first}
	return f, calls.bed.Node.Do(func() error {
		bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "fleet0"}}
		err := netlink.LinkAdd(bridge)
		f.bridge = bridge.Index
		return err
	})
}

// newPod makes a pod's veth and gives the pod's side its address.
func (f *fleet) newPod() (pod, error) {
	i := len(f.pods)
	hostLink, ifName, ip := fmt.Sprintf("v%d", i), fmt.Sprintf("e%d", i), f.nextIP
	if err := f.link(hostLink, ifName, ip); err != nil {
		return pod{}, fmt.Errorf("veth of pod %d: %w", i, err)
	}
	p := pod{
		containerID: fmt.Sprintf("%064x", 1000+i), ifName: ifName, netns: f.shared.Netns.Path(),
		namespace: "default", name: fmt.Sprintf("pod-%d", i), uid: fmt.Sprintf("uid-%d", i),
		prevResult: resultOf(hostLink, ifName, f.shared.Netns.Path(), ip),
	}
	f.pods, f.nextIP = append(f.pods, p), ip.Next()
	return p, nil
}

// grow attaches more pods by the plugin's ADD until there are n.
func (f *fleet) grow(ctx context.Context, n int) error {
	for len(f.pods) < n {
		p, err := f.newPod()
		if err != nil {
			return err
		}
		if _, err := f.calls.call(ctx, p, f.entry, "ADD"); err != nil {
			return fmt.Errorf("pod %s: %w", p.name, err)
		}
		if err := writeRuntimeCache(f.calls.bed, p); err != nil {
			return fmt.Errorf("pod %s: %w", p.name, err)
		}
	}
	return nil
}

func (f *fleet) link(hostLink, ifName string, ip netip.Addr) error {
	netns, err := os.Open(f.shared.Netns.Path())
	if err != nil {
		return err
	}
	defer netns.Close()
	err = f.calls.bed.Node.Do(func() error {
		return netlink.LinkAdd(&netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: hostLink, MasterIndex: f.bridge},
			PeerName:  ifName, PeerNamespace: netlink.NsFd(int(netns.Fd())),
		})
	})
	if err != nil {
		return err
	}
	return f.shared.Netns.Do(func() error {
		link, err := netlink.LinkByName(ifName)
		if err != nil {
			return err
		}
		return netlink.AddrAdd(link, &netlink.Addr{IPNet: &net.IPNet{IP: ip.AsSlice(), Mask: net.CIDRMask(32, 32)}})
	})
}

func cacheDir(bed *testbed.Bed) string { return filepath.Join(bed.Dir, "cache") }

// writeRuntimeCache writes the file that libcni 1.3 has of an attachment (libcni/api.go,
// cachedInfo).
func writeRuntimeCache(bed *testbed.Bed, p pod) error {
	config, err := bed.Conflist()
	if err != nil {
		return err
	}
	data, err := json.Marshal(map[string]any{
		"kind": "cniCacheV1", "containerId": p.containerID, "config": config, "ifName": p.ifName, "networkName": testbed.Network, "netns": p.netns,
		"cniArgs": [][2]string{{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", p.namespace}, {"K8S_POD_NAME", p.name}, {"K8S_POD_UID", p.uid}},
		"result":  p.prevResult,
	})
	if err != nil {
		return err
	}
	dir := filepath.Join(cacheDir(bed), "results")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, testbed.Network+"-"+p.containerID+"-"+p.ifName), data, 0o600)
}
