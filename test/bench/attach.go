package main

import (
	"context"
	"fmt"
	"io"
	"os/exec"

	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

// contests are our backends, each against portmap with iptables: that is what portmap uses where its configuration names no
// backend and the node has the command. It is the baseline of our nftables, too, in the form that the same node has: so our
// backends are in one measure, and what a node gains by changing from one to the other can be read from it.
var contests = []contest{
	{"nft", "iptables-nft", "nft", "iptables", "bridge"},
	{"legacy", "iptables-legacy", "legacy", "iptables", "bridge"},
	{"nftables", "nftables", "nft", "iptables", "bridge"},
}

// routed are the same for pods that are routed, whose DEL takes nothing out of the bridge's table and so waits for no packet
// on its way through it. They are for information; the bridge is the dearer one.
var routed = []contest{
	{"nft_routed", "iptables-nft", "nft", "iptables", "ptp"},
	{"legacy_routed", "iptables-legacy", "legacy", "iptables", "ptp"},
	{"nftables_routed", "nftables", "nft", "iptables", "ptp"},
}

// ownNFTables is nftables against nftables: what is left of the difference where neither has to do with iptables. It is for
// information, as portmap runs the command nft, which not every node has.
var ownNFTables = contest{"own_nftables", "nftables", "nft", "nftables", "bridge"}

// attaching is the time of ADD and DEL against those of the portmap plugin, and the processes that they start. The headline
// is the worst of what is measured with iptables.
func attaching(ctx context.Context, tools testbed.Tools, progress io.Writer) ([]figure, error) {
	var figures []figure
	var worst outcome
	for _, c := range contests {
		for _, rules := range []int{0, crowd} {
			o, err := c.hold(ctx, tools, rules, progress)
			if err != nil {
				return nil, err
			}
			figures = append(figures, o.ratios(fmt.Sprintf("%s_%d", c.name, rules))...)
			if rules == 0 {
				figures = append(figures, figure{"add_" + c.name + "_ms", o.ms, "ms"})
			}
			if c.ours == "nftables" {
				if rules == 0 {
					figures = append(figures, o.processes("_nftables")...)
				}
				continue
			}
			worst = worst.or(o)
		}
	}
	figures = append(figures, worst.ratios("")...)
	figures = append(figures, worst.processes("")...)
	for _, c := range routed {
		o, err := c.hold(ctx, tools, 0, progress)
		if err != nil {
			return nil, err
		}
		figures = append(figures, o.ratios(c.name)...)
	}
	if _, err := exec.LookPath("nft"); err != nil {
		fmt.Fprintf(progress, "portmap's own nftables is left out: %v (Debian package nftables)\n", err)
		return figures, nil
	}
	o, err := ownNFTables.hold(ctx, tools, 0, progress)
	if err != nil {
		return nil, err
	}
	return append(figures, o.ratios(ownNFTables.name)...), nil
}

// outcome of a contest.
type outcome struct {
	add, del                   float64 // our time by portmap's
	ms                         float64 // of our ADD
	addProcesses, delProcesses int
}

// or is the worse of two in each respect.
func (o outcome) or(p outcome) outcome {
	return outcome{
		max(o.add, p.add), max(o.del, p.del), max(o.ms, p.ms),
		max(o.addProcesses, p.addProcesses), max(o.delProcesses, p.delProcesses),
	}
}

// ratios are named for a contest, or for all where there is no name.
func (o outcome) ratios(name string) []figure {
	if name != "" {
		name = "_" + name
	}
	return []figure{{"add_vs_portmap" + name, o.add, "ratio"}, {"del_vs_portmap" + name, o.del, "ratio"}}
}

func (o outcome) processes(suffix string) []figure {
	return []figure{
		{"add_processes" + suffix, float64(o.addProcesses), "processes"},
		{"del_processes" + suffix, float64(o.delProcesses), "processes"},
	}
}
