package main

import (
	"context"
	"fmt"
	"io"
	"slices"

	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

// contest is our plugin with one backend against portmap with one port mapping: the same pod, both in the steady state, in
// turn.
type contest struct {
	name    string
	ours    string // our backend
	form    string // of the command iptables that portmap finds, and of the other rules
	theirs  string // portmap's backend
	primary string // what connects the pod
}

// turns is how often each plugin adds and deletes, after a first time in which it makes its chains.
const turns = 15

// hold measures the contest on a node of its own, on which other rules of that number stand.
func (c contest) hold(ctx context.Context, tools testbed.Tools, rules int, progress io.Writer) (outcome, error) {
	fmt.Fprintf(progress, "ADD and DEL with %s against portmap with %s (iptables is %s), %d other rules: %d times\n", c.ours, c.theirs, c.form, rules, turns)
	bed, err := testbed.New(ctx, testbed.Options{Tools: tools, Primary: c.primary})
	if err != nil {
		return outcome{}, err
	}
	defer bed.Close()
	if err := addRules(ctx, bed, c.form, rules); err != nil {
		return outcome{}, err
	}
	pod, err := bed.RunPod(ctx, "default", "pod", nil)
	if err != nil {
		return outcome{}, err
	}
	path, err := iptablesOf(bed, c.form)
	if err != nil {
		return outcome{}, err
	}
	calls := caller{tools, bed, pod, path}
	kube2iam := testbed.Kube2IAM(c.ours)
	kube2iam["stateDir"] = bed.StateDir
	o, err := calls.inTurn(ctx, kube2iam, portmap(c.theirs))
	if err != nil {
		return outcome{}, err
	}
	if o.addProcesses, err = calls.processes(ctx, kube2iam, "ADD"); err != nil {
		return outcome{}, err
	}
	o.delProcesses, err = calls.processes(ctx, kube2iam, "DEL")
	return o, err
}

func portmap(backend string) testbed.Entry {
	return testbed.Entry{
		"type": "portmap", "backend": backend, "capabilities": map[string]bool{"portMappings": true},
		"runtimeConfig": map[string]any{"portMappings": []map[string]any{{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}}},
	}
}

// inTurn has both add and delete in turn, each first in every other turn.
func (c caller) inTurn(ctx context.Context, ours, theirs testbed.Entry) (outcome, error) {
	var add, del, ms []float64
	for turn := range turns + 1 {
		entries := []testbed.Entry{ours, theirs}
		if turn%2 == 1 {
			slices.Reverse(entries)
		}
		took := map[string]float64{}
		for _, entry := range entries {
			for _, command := range []string{"ADD", "DEL"} {
				d, err := c.call(ctx, entry, command)
				if err != nil {
					return outcome{}, err
				}
				took[entry["type"].(string)+command] = d.Seconds()
			}
		}
		if turn == 0 {
			continue
		}
		add = append(add, took["kube2iam-cniADD"]/took["portmapADD"])
		del = append(del, took["kube2iam-cniDEL"]/took["portmapDEL"])
		ms = append(ms, 1000*took["kube2iam-cniADD"])
	}
	return outcome{add: median(add), del: median(del), ms: median(ms)}, nil
}
