package main

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"os/exec"
	"sync"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

const (
	parallelPods  = 110
	parallelTurns = 5
)

// measureParallel measures a node that boots: 110 concurrent ADDs, each a process, then 110
// concurrent DELs, against as many of portmap's with the same previous results. Each turn is on a
// new node.
func measureParallel(ctx context.Context, tools testbed.Tools, progress io.Writer) ([]figure, error) {
	fmt.Fprintf(progress, "%d concurrent ADDs, then %d DELs: %d times\n", parallelPods, parallelPods, parallelTurns)
	var add, del, addMs, delMs []float64
	for turn := range parallelTurns {
		var took [2][2]time.Duration
		for _, plugin := range inOrder(turn) {
			var err error
			if took[plugin], err = parallelCalls(ctx, tools, plugin == 1); err != nil {
				return nil, err
			}
		}
		ours, portmap := took[0], took[1]
		fmt.Fprintf(progress, "ADD %s, portmap's %s; DEL %s, portmap's %s\n", ours[0], portmap[0], ours[1], portmap[1])
		add, addMs = append(add, ours[0].Seconds()/portmap[0].Seconds()), append(addMs, 1000*ours[0].Seconds())
		del, delMs = append(del, ours[1].Seconds()/portmap[1].Seconds()), append(delMs, 1000*ours[1].Seconds())
	}
	return []figure{
		{"add_parallel_110", median(add), "ratio"},
		{"del_parallel_110", median(del), "ratio"},
		{"add_parallel_110_ms", median(addMs), "ms"},
		{"del_parallel_110_ms", median(delMs), "ms"},
	}, nil
}

// parallelCalls returns the time of all ADDs and of all DELs on a new node.
func parallelCalls(ctx context.Context, tools testbed.Tools, portmaps bool) (took [2]time.Duration, err error) {
	bed, err := testbed.New(ctx, testbed.Options{Tools: tools, Primary: "bridge"})
	if err != nil {
		return took, err
	}
	defer bed.Close()
	path, err := iptablesPath(bed)
	if err != nil {
		return took, err
	}
	ours := testbed.Kube2IAM("nftables")
	ours["stateDir"] = bed.StateDir
	entryOf := func(i int) testbed.Entry {
		if portmaps {
			return portmapEntry("iptables", 8000+i)
		}
		return ours
	}
	calls := caller{tools, bed, path}
	pods, err := newFleet(calls, nil, netip.MustParseAddr("10.201.0.2"))
	if err != nil {
		return took, err
	}
	for range 1 + parallelPods {
		if _, err := pods.newPod(); err != nil {
			return took, err
		}
	}
	// The first ADD comes alone: portmap's first ADDs of a node fail if they make its chains at once.
	first, err := calls.command(ctx, pods.pods[0], entryOf(parallelPods), "ADD")
	if err != nil {
		return took, err
	}
	if _, err := runAll(bed, []*exec.Cmd{first}); err != nil {
		return took, err
	}
	for i, command := range []string{"ADD", "DEL"} {
		var cmds []*exec.Cmd
		for i, p := range pods.pods[1:] {
			cmd, err := calls.command(ctx, p, entryOf(i), command)
			if err != nil {
				return took, err
			}
			cmds = append(cmds, cmd)
		}
		if took[i], err = runAll(bed, cmds); err != nil {
			return took, err
		}
	}
	return took, nil
}

// runAll starts all processes and returns the time until the last one's end.
func runAll(bed *testbed.Bed, cmds []*exec.Cmd) (time.Duration, error) {
	errs := make([]error, len(cmds))
	var wg sync.WaitGroup
	start := time.Now()
	for i, cmd := range cmds {
		wg.Go(func() { errs[i] = bed.Node.Do(func() error { return run(cmd) }) })
	}
	wg.Wait()
	took := time.Since(start)
	for _, err := range errs {
		if err != nil {
			return 0, err
		}
	}
	return took, nil
}
