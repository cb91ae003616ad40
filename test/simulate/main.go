// Command simulate prints what a large fleet asks of STS in a few scenarios, and draws it.
//
//	simulate [SVG]
package main

import (
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/test/scale"
)

const (
	nodes, pods = 5000, 110
	// quota is AWS's default limit of AssumeRole calls a second for an account in a region.
	quota = 600
	seed  = 20261125
)

// scenarios all last five hours. Disturbances begin after an hour.
var scenarios = []scale.Scenario{
	{Name: "steady"},
	{Name: "steady, where all pods started in one minute", Together: true},
	{Name: "rolling restart in one hour", RestartAt: time.Hour, RestartTime: time.Hour, HandOver: true},
	{Name: "one hour in which STS fails one call in five", BrownoutAt: time.Hour, BrownoutTime: time.Hour, Failing: 0.2},
	{Name: "both together", RestartAt: time.Hour, RestartTime: time.Hour, HandOver: true, BrownoutAt: time.Hour, BrownoutTime: time.Hour, Failing: 0.2},
	{Name: "every proxy killed in one hour", RestartAt: time.Hour, RestartTime: time.Hour},
	{Name: "that, and STS fails one call in five", RestartAt: time.Hour, RestartTime: time.Hour, BrownoutAt: time.Hour, BrownoutTime: time.Hour, Failing: 0.2},
	{Name: "one hour in which STS fails half of the calls", BrownoutAt: time.Hour, BrownoutTime: time.Hour, Failing: 0.5},
	{Name: "one hour without STS", BrownoutAt: time.Hour, BrownoutTime: time.Hour, Failing: 1},
}

func main() {
	if len(os.Args) > 2 || len(os.Args) == 2 && strings.HasPrefix(os.Args[1], "-") {
		fmt.Fprintln(os.Stderr, "usage: simulate [SVG]")
		os.Exit(2)
	}
	plots := run(os.Stdout, os.Stderr)
	if len(os.Args) == 2 {
		if err := os.WriteFile(os.Args[1], []byte(draw(plots)), 0o644); err != nil {
			fmt.Fprintln(os.Stderr, "simulate:", err)
			os.Exit(1)
		}
	}
}

// plot has the calls a second of a scenario for each minute.
type plot struct {
	name    string
	minutes []float64
}

func run(stdout, progress io.Writer) (plots []plot) {
	fmt.Fprintf(stdout, "%d nodes with %d pods each; AssumeRole's quota is %d calls a second; seed %d\n\n", nodes, pods, quota, seed)
	table := tabwriter.NewWriter(stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(table, "mean\tpeak\tratio\tthrottled\twithout\trecovered\t  scenario")
	for _, s := range scenarios {
		fmt.Fprintln(progress, "simulating:", s.Name)
		s.Nodes, s.Pods, s.Length, s.Quota, s.Seed = nodes, pods, 5*time.Hour, quota, seed
		r := scale.Run(s)
		minutes := scale.PerMinute(r.Calls)
		plots = append(plots, plot{s.Name, minutes})
		sum, throttled := 0.0, 0
		for _, m := range minutes {
			sum += m
		}
		for _, n := range r.Throttled {
			throttled += n
		}
		mean, peak := sum/float64(len(minutes)), slices.Max(minutes)
		fmt.Fprintf(table, "%.0f\t%.0f\t%.2f\t%d\t%d\t%s\t  %s\n", mean, peak, peak/mean, throttled, slices.Max(r.Refused), back(s, r), s.Name)
	}
	table.Flush()
	return plots
}

// back returns how long after the end of the disturbance the last pod had credentials again.
func back(s scale.Scenario, r scale.Result) string {
	last := -1
	for minute, n := range r.Refused {
		if n > 0 {
			last = minute
		}
	}
	switch end := int(max(s.BrownoutAt+s.BrownoutTime, s.RestartAt+s.RestartTime) / time.Minute); {
	case last < 0:
		return "-"
	case last < end:
		return "immediately"
	case last == len(r.Refused)-1:
		return "never"
	default:
		return fmt.Sprintf("%d min", last+1-end)
	}
}

// The drawing's measures, in pixels.
const (
	width, height, left, top, gap = 900, 130, 60, 30, 60
	most                          = 1000.0 // calls a second at the top
)

// draw returns an SVG with a panel for each scenario.
func draw(plots []plot) string {
	var b strings.Builder
	total := top + len(plots)*(height+gap)
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="12">`+"\n", width+left+20, total)
	fmt.Fprintf(&b, `<rect width="100%%" height="100%%" fill="white"/>`+"\n")
	for i, p := range plots {
		y := top + i*(height+gap)
		at := func(v float64) float64 { return float64(y+height) - min(v, most)/most*height }
		fmt.Fprintf(&b, `<text x="%d" y="%d">%s: calls a second</text>`+"\n", left, y-8, p.name)
		for _, v := range []float64{0, 500, 1000} {
			fmt.Fprintf(&b, `<line x1="%d" x2="%d" y1="%.1f" y2="%.1f" stroke="#ddd"/><text x="%d" y="%.1f" text-anchor="end">%.0f</text>`+"\n", left, left+width, at(v), at(v), left-6, at(v)+4, v)
		}
		fmt.Fprintf(&b, `<line x1="%d" x2="%d" y1="%.1f" y2="%.1f" stroke="#c00" stroke-dasharray="4"/>`+"\n", left, left+width, at(quota), at(quota))
		step := float64(width) / float64(len(p.minutes)-1)
		for hour := 0; hour*60 <= len(p.minutes); hour++ {
			fmt.Fprintf(&b, `<text x="%.1f" y="%d" text-anchor="middle">%d h</text>`+"\n", float64(left)+float64(hour*60)*step, y+height+16, hour)
		}
		b.WriteString(`<polyline fill="none" stroke="#06c" stroke-width="1.5" points="`)
		for minute, v := range p.minutes {
			fmt.Fprintf(&b, "%.1f,%.1f ", float64(left)+float64(minute)*step, at(v))
		}
		b.WriteString(`"/>` + "\n")
	}
	b.WriteString("</svg>\n")
	return b.String()
}
