package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/uplink"
	"github.com/kube2iam-cni/kube2iam-cni/test/netnstest"
	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

// guardedPackets is how many packets the kernel runs the program on, in each of several runs.
const guardedPackets, guardRuns = 1_000_000, 5

// uplinkGuard measures what the guard at the uplinks costs a packet that it does not concern.
func uplinkGuard(ctx context.Context, _ testbed.Tools, progress io.Writer) ([]figure, error) {
	fmt.Fprintf(progress, "guard at the uplinks: %d times %d packets\n", guardRuns, guardedPackets)
	dir, err := os.MkdirTemp("", "kube2iam-cni-bench")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	var took []float64
	node, err := netnstest.Create(func() error {
		program, err := guardedUplink(dir + "/uplinks")
		if err != nil {
			return err
		}
		defer program.Close()
		// An IPv4 packet from a pod to another address: Ethernet, IPv4 and TCP headers.
		packet := make([]byte, 14+20+20)
		packet[12], packet[14], packet[23] = 0x08, 0x45, 6
		for range guardRuns {
			if err := ctx.Err(); err != nil {
				return err
			}
			_, duration, err := program.Benchmark(packet, guardedPackets, func() {})
			if err != nil {
				return err
			}
			took = append(took, float64(duration)/float64(time.Nanosecond))
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return []figure{{"uplink_guard_ns", median(took), "ns"}}, node.Close()
}

// guardedUplink makes an uplink in this namespace, guards it, and returns the program.
func guardedUplink(dir string) (*ebpf.Program, error) {
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "peer"}); err != nil {
		return nil, err
	}
	eth0, err := netlink.LinkByName("eth0")
	if err != nil {
		return nil, err
	}
	if err := netlink.LinkSetUp(eth0); err != nil {
		return nil, err
	}
	everywhere := &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}
	if err := netlink.RouteAdd(&netlink.Route{LinkIndex: eth0.Attrs().Index, Dst: everywhere, Scope: netlink.SCOPE_LINK}); err != nil {
		return nil, err
	}
	guard, err := uplink.New(attachment.MetadataIPv4, dir)
	if err != nil {
		return nil, err
	}
	defer guard.Close()
	if _, err := guard.Reconcile(); err != nil {
		return nil, err
	}
	filters, err := netlink.FilterList(eth0, netlink.HANDLE_MIN_EGRESS)
	if err != nil || len(filters) != 1 {
		return nil, fmt.Errorf("filters of the uplink: %v, %v", filters, err)
	}
	return ebpf.NewProgramFromID(ebpf.ProgramID(filters[0].(*netlink.BpfFilter).Id))
}
