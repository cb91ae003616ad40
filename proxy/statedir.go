package main

import (
	"log/slog"
	"net/netip"
	"slices"
	"sync/atomic"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/broker"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/imds"
)

// stateDirCheck warns once where --state-dir may not be the plugin's stateDir: a pod of this node
// connects to the proxy, and no pod of this node is on record. The plugin writes a pod's record before
// it redirects the pod. While a node migrates from kube2iam, pods are redirected by kube2iam's rule
// and have no record either.
type stateDirCheck struct {
	stateDir string
	records  *attachment.Index
	pods     func() []broker.Assignment
	log      *slog.Logger
	done     atomic.Bool // it has warned, or a pod is on record
}

func newStateDirCheck(stateDir string, records *attachment.Index, pods func() []broker.Assignment, log *slog.Logger) *stateDirCheck {
	return &stateDirCheck{stateDir: stateDir, records: records, pods: pods, log: log}
}

// watching wraps destinations and inspects every connection. A connection that is refused
// counts too: a pod that is redirected inside its network namespace is let through by its record
// only.
func (c *stateDirCheck) watching(destinations imds.Destinations) imds.Destinations {
	return func(source netip.Addr, destination netip.AddrPort) bool {
		c.connected(source)
		return destinations(source, destination)
	}
}

func (c *stateDirCheck) connected(source netip.Addr) {
	if c.done.Load() {
		return
	}
	if c.isRecorded(source) {
		c.done.Store(true)
		return
	}
	pods := c.pods()
	if !slices.ContainsFunc(pods, func(p broker.Assignment) bool { return slices.Contains(p.IPs, source) }) {
		return // not known yet, or not a pod's
	}
	recorded := slices.ContainsFunc(pods, func(p broker.Assignment) bool { return slices.ContainsFunc(p.IPs, c.isRecorded) })
	if c.done.CompareAndSwap(false, true) && !recorded {
		c.log.Warn("a pod connects to this proxy, but the state directory has no record of any pod of this node: "+
			"is --state-dir the plugin's stateDir? Or was no pod attached by the plugin yet? Until then pods are found by the addresses that they report", "state dir", c.stateDir, "pod's address", source)
	}
}

// isRecorded tells whether an address has a record, readable or not.
func (c *stateDirCheck) isRecorded(ip netip.Addr) bool {
	record, err := c.records.Holder(ip)
	return record != nil || err != nil
}
