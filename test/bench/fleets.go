package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/test/scale"
	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

// fleets simulates how often a fleet calls STS, with the schedule and the limits of the proxy: the
// scenarios of docs/scale.md with another seed.
func fleets(_ context.Context, _ testbed.Tools, progress io.Writer) ([]figure, error) {
	fmt.Fprintln(progress, "simulating fleets")
	fleet := scale.Scenario{Nodes: 5000, Pods: 110, Length: 5 * time.Hour, Quota: 600, Seed: 1}
	restart, brownout, both := fleet, fleet, fleet
	restart.RestartAt, restart.RestartTime, restart.HandOver = time.Hour, time.Hour, true
	brownout.BrownoutAt, brownout.BrownoutTime, brownout.Failing = time.Hour, time.Hour, 0.2
	both.RestartAt, both.RestartTime, both.HandOver = restart.RestartAt, restart.RestartTime, true
	both.BrownoutAt, both.BrownoutTime, both.Failing = brownout.BrownoutAt, brownout.BrownoutTime, brownout.Failing
	together := fleet
	together.Together = true
	killed := restart
	killed.HandOver = false
	steady := 0
	for _, n := range scale.Run(fleet).Calls {
		steady += n
	}
	figures := []figure{{"sts_calls_per_hour_per_pod", float64(steady) / fleet.Length.Hours() / float64(fleet.Nodes*fleet.Pods), "calls"}}
	for name, s := range map[string]scale.Scenario{"restart": restart, "brownout": brownout, "killed": killed, "together": together, "restart_in_brownout": both} {
		minutes := scale.PerMinute(scale.Run(s).Calls)
		sum := 0.0
		for _, m := range minutes {
			sum += m
		}
		figures = append(figures, figure{"sts_peak_vs_mean_" + name, slices.Max(minutes) / (sum / float64(len(minutes))), "ratio"})
	}
	slices.SortFunc(figures[1:], func(a, b figure) int { return len(a.name) - len(b.name) })
	return figures, nil
}
