// Command bench prints the project's figures, one a line: name, value, unit. A ratio is against a baseline that runs in turn
// with what is measured, on the same node and path, so that a noisy machine disturbs both alike. What is counted, is counted
// by the kernel.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"syscall"

	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

func main() {
	// Parts of a measurement that must be a process of their own.
	switch args := os.Args[1:]; {
	case len(args) == 4 && args[0] == "load":
		os.Exit(load(args[1], args[2], args[3], os.Stdout))
	case len(args) >= 3 && args[0] == "trace":
		os.Exit(trace(args[1], args[2:], os.Stderr))
	}
	os.Exit(run(os.Stdout, os.Stderr))
}

func run(stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE)
	defer stop()
	tools, err := testbed.BuildTools(ctx, false)
	if err != nil {
		fmt.Fprintln(stderr, "bench:", err)
		return 1
	}
	for _, measure := range []func(context.Context, testbed.Tools, io.Writer) ([]figure, error){cachedCredentials, attaching, binary, reconciling, starting, memory, hostile, fleets} {
		figures, err := measure(ctx, tools, stderr)
		if err != nil {
			fmt.Fprintln(stderr, "bench:", err)
			return 1
		}
		for _, f := range figures {
			fmt.Fprintln(stdout, f)
		}
	}
	return 0
}

// figure is one line of the output.
type figure struct {
	name  string
	value float64
	unit  string
}

func (f figure) String() string { return fmt.Sprintf("%s %.3g %s", f.name, f.value, f.unit) }

func median(values []float64) float64 {
	s := slices.Sorted(slices.Values(values))
	n := len(s)
	if n%2 == 1 {
		return s[n/2]
	}
	return (s[n/2-1] + s[n/2]) / 2
}
