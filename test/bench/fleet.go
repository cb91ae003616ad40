package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"

	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/vishvananda/netlink"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/node"
	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

// fleet is pods of a node that share a network namespace: what the agent sees of a pod is its veth, its addresses and its
// record, and a sandbox for each would take minutes. Their host sides are ports of a bridge, of which there is more to look
// after than of routed ones. No link is up, because nothing is sent.
type fleet struct {
	bed    *testbed.Bed
	shared *testbed.Sandbox
	bridge int
	pods   int
	free   netip.Addr
}

func newFleet(bed *testbed.Bed) (*fleet, error) {
	shared, err := bed.NewSandbox("default", "fleet", "fleet")
	if err != nil {
		return nil, err
	}
	f := &fleet{bed: bed, shared: shared, free: testbed.PodSubnet.Addr().Next()}
	return f, bed.Node.Do(func() error {
		bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "cni0"}}
		err := netlink.LinkAdd(bridge)
		f.bridge = bridge.Index
		return err
	})
}

// grow attaches more pods until there are n, as the plugin does.
func (f *fleet) grow(ctx context.Context, n *node.Node, pods int) error {
	defer n.Close()
	for ; f.pods < pods; f.pods++ {
		r := node.Request{
			ContainerID: fmt.Sprintf("%064x", 1000+f.pods), IfName: fmt.Sprintf("e%d", f.pods), Netns: f.shared.Netns.Path(), Network: testbed.Network,
			Pod: attachment.Pod{Namespace: "default", Name: fmt.Sprintf("pod-%d", f.pods), UID: fmt.Sprintf("uid-%d", f.pods)},
			IPs: []netip.Addr{f.free},
		}
		if err := f.link(fmt.Sprintf("v%d", f.pods), r.IfName, f.free); err != nil {
			return fmt.Errorf("veth of pod %d: %w", f.pods, err)
		}
		err := f.bed.Node.Do(func() error {
			_, err := n.Attach(ctx, r)
			return err
		})
		if err == nil {
			err = remember(f.bed, r, fmt.Sprintf("v%d", f.pods))
		}
		if err != nil {
			return fmt.Errorf("pod %d: %w", f.pods, err)
		}
		f.free = f.free.Next()
	}
	return nil
}

// link makes a pod's veth and gives the pod's side its address.
func (f *fleet) link(host, pod string, ip netip.Addr) error {
	netns, err := os.Open(f.shared.Netns.Path())
	if err != nil {
		return err
	}
	defer netns.Close()
	err = f.bed.Node.Do(func() error {
		return netlink.LinkAdd(&netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: host, MasterIndex: f.bridge},
			PeerName:  pod, PeerNamespace: netlink.NsFd(int(netns.Fd())),
		})
	})
	if err != nil {
		return err
	}
	return f.shared.Netns.Do(func() error {
		link, err := netlink.LinkByName(pod)
		if err != nil {
			return err
		}
		return netlink.AddrAdd(link, &netlink.Addr{IPNet: &net.IPNet{IP: ip.AsSlice(), Mask: net.CIDRMask(32, 32)}})
	})
}

func cacheDir(bed *testbed.Bed) string { return filepath.Join(bed.Dir, "cache") }

// remember writes what libcni 1.3 keeps of an attachment (libcni/api.go, cachedInfo).
func remember(bed *testbed.Bed, r node.Request, hostLink string) error {
	config, err := bed.Conflist()
	if err != nil {
		return err
	}
	data, err := json.Marshal(map[string]any{
		"kind": "cniCacheV1", "containerId": r.ContainerID, "config": config, "ifName": r.IfName, "networkName": r.Network, "netns": r.Netns,
		"cniArgs": [][2]string{{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", r.Pod.Namespace}, {"K8S_POD_NAME", r.Pod.Name}, {"K8S_POD_UID", r.Pod.UID}},
		"result": types100.Result{
			CNIVersion: types100.ImplementedSpecVersion,
			Interfaces: []*types100.Interface{{Name: hostLink}, {Name: r.IfName, Sandbox: r.Netns}},
			IPs:        []*types100.IPConfig{{Interface: types100.Int(1), Address: net.IPNet{IP: r.IPs[0].AsSlice(), Mask: net.CIDRMask(24, 32)}}},
		},
	})
	if err != nil {
		return err
	}
	dir := filepath.Join(cacheDir(bed), "results")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, r.Network+"-"+r.ContainerID+"-"+r.IfName), data, 0o600)
}
