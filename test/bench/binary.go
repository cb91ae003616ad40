package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

// starts is how often each plugin answers VERSION.
const starts = 41

// binary measures the size of the stripped plugin, and the time until it has answered VERSION
// against portmap's.
func binary(ctx context.Context, tools testbed.Tools, progress io.Writer) ([]figure, error) {
	fmt.Fprintf(progress, "VERSION: %d times\n", starts)
	ours, err := tools.Path("kube2iam-cni")
	if err != nil {
		return nil, err
	}
	theirs, err := tools.Path("portmap")
	if err != nil {
		return nil, err
	}
	info, err := os.Stat(ours)
	if err != nil {
		return nil, err
	}
	var ratios []float64
	for range starts {
		var took [2]time.Duration
		for i, program := range []string{ours, theirs} {
			// VERSION needs no standard input. Writing to a plugin that has ended would raise
			// SIGPIPE.
			cmd := exec.CommandContext(ctx, program)
			cmd.Env = []string{"CNI_COMMAND=VERSION"}
			start := time.Now()
			if out, err := cmd.CombinedOutput(); err != nil {
				return nil, fmt.Errorf("%s VERSION: %w: %s", program, err, out)
			}
			took[i] = time.Since(start)
		}
		ratios = append(ratios, took[0].Seconds()/took[1].Seconds())
	}
	return []figure{
		{"plugin_start_vs_portmap", median(ratios), "ratio"},
		{"plugin_binary_mb", float64(info.Size()) / 1e6, "MB"},
	}, nil
}
