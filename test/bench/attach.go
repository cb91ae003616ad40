package main

import (
	"context"
	"fmt"
	"io"
	"os/exec"

	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

// comparisons are our backends, each against portmap with iptables, which portmap prefers where the
// node has the command. One baseline for both shows what a node gains from nftables.
var comparisons = []comparison{
	{"iptables", "iptables", "iptables", "bridge"},
	{"nftables", "nftables", "iptables", "bridge"},
}

// routedComparisons are for information: a bridged pod costs more.
var routedComparisons = []comparison{
	{"iptables_routed", "iptables", "iptables", "ptp"},
	{"nftables_routed", "nftables", "iptables", "ptp"},
}

// nftablesComparison is for information: portmap with nftables runs nft(8), which not every node
// has.
var nftablesComparison = comparison{"own_nftables", "nftables", "nftables", "bridge"}

// measureAttach measures ADD and DEL against portmap's, and counts the processes that they start.
// The headlines add_vs_portmap and del_vs_portmap are the worst with iptables.
func measureAttach(ctx context.Context, tools testbed.Tools, progress io.Writer) ([]figure, error) {
	var figures []figure
	var worst outcome
	for _, c := range comparisons {
		for _, rules := range []int{0, manyRules} {
			o, err := c.measure(ctx, tools, rules, progress)
			if err != nil {
				return nil, err
			}
			figures = append(figures, o.ratios(fmt.Sprintf("_%s_%d", c.name, rules))...)
			if rules == 0 {
				figures = append(figures, figure{"add_" + c.name + "_ms", o.ms, "ms"})
			}
			if c.backend == "iptables" {
				worst = worst.worse(o)
			} else if rules == 0 {
				figures = append(figures, o.processes("_nftables")...)
			}
		}
	}
	figures = append(figures, worst.ratios("")...)
	figures = append(figures, worst.processes("")...)
	others := routedComparisons
	if _, err := exec.LookPath("nft"); err != nil {
		fmt.Fprintf(progress, "portmap with nftables is left out: %v (Debian package nftables)\n", err)
	} else {
		others = append(others, nftablesComparison)
	}
	for _, c := range others {
		o, err := c.measure(ctx, tools, 0, progress)
		if err != nil {
			return nil, err
		}
		figures = append(figures, o.ratios("_"+c.name)...)
	}
	return figures, nil
}
