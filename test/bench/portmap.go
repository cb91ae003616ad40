package main

import (
	"context"
	"fmt"
	"io"

	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

// comparison is a backend of ours against portmap with one port mapping: the same pod, both plugins
// in the steady state.
type comparison struct {
	name    string
	backend string // ours
	portmap string // portmap's backend
	primary string // the plugin that connects the pod
}

// comparisonTurns is how often each plugin adds and deletes, after a first time that makes its
// chains.
const comparisonTurns = 15

// measure measures on a node of its own, whose nat table has so many other rules.
func (c comparison) measure(ctx context.Context, tools testbed.Tools, rules int, progress io.Writer) (outcome, error) {
	fmt.Fprintf(progress, "ADD and DEL with %s against portmap with %s, pods by %s, %d other rules: %d times\n",
		c.backend, c.portmap, c.primary, rules, comparisonTurns)
	bed, err := testbed.New(ctx, testbed.Options{Tools: tools, Primary: c.primary})
	if err != nil {
		return outcome{}, err
	}
	defer bed.Close()
	path, err := iptablesPath(bed)
	if err != nil {
		return outcome{}, err
	}
	if err := addRules(ctx, bed, rules); err != nil {
		return outcome{}, err
	}
	sandbox, err := bed.RunPod(ctx, "default", "pod", nil)
	if err != nil {
		return outcome{}, err
	}
	calls, p := caller{tools, bed, path}, podOf(sandbox)
	ours := testbed.Kube2IAM(c.backend)
	ours["stateDir"] = bed.StateDir
	o, err := calls.compare(ctx, p, ours, portmapEntry(c.portmap, 8080))
	if err != nil {
		return outcome{}, err
	}
	if o.addProcesses, err = calls.processes(ctx, p, ours, "ADD"); err != nil {
		return outcome{}, err
	}
	o.delProcesses, err = calls.processes(ctx, p, ours, "DEL")
	return o, err
}

// portmapEntry is portmap with one port mapping.
func portmapEntry(backend string, hostPort int) testbed.Entry {
	return testbed.Entry{
		"type": "portmap", "backend": backend, "capabilities": map[string]bool{"portMappings": true},
		"runtimeConfig": map[string]any{"portMappings": []map[string]any{{"hostPort": hostPort, "containerPort": 80, "protocol": "tcp"}}},
	}
}

// compare has both plugins add and delete alternately.
func (c caller) compare(ctx context.Context, p pod, ours, portmap testbed.Entry) (outcome, error) {
	var add, del, ms []float64
	for turn := range comparisonTurns + 1 {
		var seconds [2]struct{ add, del float64 }
		for _, i := range inOrder(turn) {
			entry := []testbed.Entry{ours, portmap}[i]
			added, err := c.call(ctx, p, entry, "ADD")
			if err != nil {
				return outcome{}, err
			}
			deleted, err := c.call(ctx, p, entry, "DEL")
			if err != nil {
				return outcome{}, err
			}
			seconds[i].add, seconds[i].del = added.Seconds(), deleted.Seconds()
		}
		if turn == 0 {
			continue
		}
		add = append(add, seconds[0].add/seconds[1].add)
		del = append(del, seconds[0].del/seconds[1].del)
		ms = append(ms, 1000*seconds[0].add)
	}
	return outcome{add: median(add), del: median(del), ms: median(ms)}, nil
}

// outcome of a comparison.
type outcome struct {
	add, del                   float64 // our time divided by portmap's
	ms                         float64 // of our ADD
	addProcesses, delProcesses int
}

// worse returns the worse of two outcomes in each respect.
func (o outcome) worse(p outcome) outcome {
	return outcome{
		max(o.add, p.add), max(o.del, p.del), max(o.ms, p.ms),
		max(o.addProcesses, p.addProcesses), max(o.delProcesses, p.delProcesses),
	}
}

func (o outcome) ratios(suffix string) []figure {
	return []figure{{"add_vs_portmap" + suffix, o.add, "ratio"}, {"del_vs_portmap" + suffix, o.del, "ratio"}}
}

func (o outcome) processes(suffix string) []figure {
	return []figure{
		{"add_processes" + suffix, float64(o.addProcesses), "processes"},
		{"del_processes" + suffix, float64(o.delProcesses), "processes"},
	}
}
