package main

import (
	"context"
	"fmt"
	"io"
	"net/netip"

	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

const (
	nodeWithFewPods  = 10
	nodeWithManyPods = 250
	// podTurns is how often the measured pod is attached to each of the two nodes.
	podTurns = 151
)

// measurePods measures how ADD and DEL depend on the number of attached pods: a pod is attached to
// and detached from a node with 250 others and one with 10, alternately. Both figures are ratios of
// medians.
func measurePods(ctx context.Context, tools testbed.Tools, progress io.Writer) ([]figure, error) {
	fmt.Fprintf(progress, "ADD and DEL with %d and %d pods attached: %d times\n", nodeWithManyPods, nodeWithFewPods, podTurns)
	var nodes []caller
	var measured []pod
	entries := make([]testbed.Entry, 2)
	for i, pods := range []int{nodeWithManyPods, nodeWithFewPods} {
		bed, err := testbed.New(ctx, testbed.Options{Tools: tools, Primary: "bridge"})
		if err != nil {
			return nil, err
		}
		defer bed.Close()
		calls := caller{tools, bed, "/usr/sbin:/usr/bin:/sbin:/bin"}
		entries[i] = testbed.Kube2IAM("nftables")
		entries[i]["stateDir"] = bed.StateDir
		others, err := newFleet(calls, entries[i], netip.MustParseAddr("10.201.1.1"))
		if err != nil {
			return nil, err
		}
		if err := others.grow(ctx, pods); err != nil {
			return nil, err
		}
		s, err := bed.RunPod(ctx, "default", "measured", nil)
		if err != nil {
			return nil, err
		}
		nodes, measured = append(nodes, calls), append(measured, podOf(s))
	}
	var add, del [2][]float64
	for turn := range podTurns + 1 {
		for _, i := range inOrder(turn) {
			for _, c := range []struct {
				command string
				times   *[]float64
			}{{"ADD", &add[i]}, {"DEL", &del[i]}} {
				took, err := nodes[i].call(ctx, measured[i], entries[i], c.command)
				if err != nil {
					return nil, err
				}
				if turn > 0 { // the first one makes the node's tables
					*c.times = append(*c.times, took.Seconds())
				}
			}
		}
	}
	return []figure{
		{"add_nftables_250_vs_10", median(add[0]) / median(add[1]), "ratio"},
		{"del_nftables_250_vs_10", median(del[0]) / median(del[1]), "ratio"},
	}, nil
}

// inOrder returns 0 and 1, in the reverse order in every other turn.
func inOrder(turn int) [2]int { return [2]int{turn % 2, 1 - turn%2} }
