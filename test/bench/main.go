// Command bench prints the project's figures, one a line: name, value, unit.
//
// A ratio compares with a baseline that runs alternately with what is measured, on the same node
// and path: other load on the machine slows down both. Counts are the kernel's.
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
	// Helpers of a measurement that run as processes of their own.
	switch args := os.Args[1:]; {
	case len(args) == 4 && args[0] == "load":
		os.Exit(load(args[1], args[2], args[3], os.Stdout))
	case len(args) >= 3 && args[0] == "trace":
		os.Exit(trace(args[1], args[2:], os.Stderr))
	}
	os.Exit(bench(os.Args[1:], os.Stdout, os.Stderr))
}

// part is a group of figures that are measured together.
type part struct {
	name, description string
	measure           func(context.Context, testbed.Tools, io.Writer) ([]figure, error)
}

var parts = []part{
	{"cached", "throughput of cached credentials and of session tokens", cachedCredentials},
	{"attach", "ADD and DEL against portmap", measureAttach},
	{"pods", "ADD and DEL with 250 pods attached against 10", measurePods},
	{"parallel", "110 ADDs and 110 DELs at once against portmap", measureParallel},
	{"binary", "size and start of the plugin", binary},
	{"agent", "the agent's rounds", reconciling},
	{"uplink", "the guard at the uplinks, for each packet", uplinkGuard},
	{"first", "first requests of pods that start, and calls of STS", starting},
	{"memory", "memory of the proxy", memory},
	{"hostile", "memory of the proxy under attack", hostile},
	{"fleet", "calls of STS by a simulated fleet", fleets},
}

// clusterPart is measured by scripts/bench.sh itself.
const clusterPart = "cluster"

// bench measures the named part, or all parts.
func bench(args []string, stdout, stderr io.Writer) int {
	selected := parts
	if len(args) > 0 {
		i := slices.IndexFunc(parts, func(p part) bool { return p.name == args[0] })
		if i < 0 {
			printParts(stderr, args[0])
			return 2
		}
		selected = parts[i : i+1]
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE)
	defer stop()
	tools, err := testbed.BuildTools(ctx, false)
	if err != nil {
		fmt.Fprintln(stderr, "bench:", err)
		return 1
	}
	for _, p := range selected {
		figures, err := p.measure(ctx, tools, stderr)
		if err != nil {
			fmt.Fprintf(stderr, "bench: %s: %v\n", p.name, err)
			return 1
		}
		for _, f := range figures {
			fmt.Fprintln(stdout, f)
		}
	}
	return 0
}

func printParts(stderr io.Writer, name string) {
	fmt.Fprintf(stderr, "bench: there is no part %q. The parts are:\n", name)
	for _, p := range parts {
		fmt.Fprintf(stderr, "  %-9s %s\n", p.name, p.description)
	}
	fmt.Fprintf(stderr, "  %-9s %s\n", clusterPart, "start of a pod, upgrades and crashes on a real node")
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
