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

// stateDirCheck warns once if --state-dir may not be the plugin's stateDir: a pod of this node connects
// although no pod of this node has a record. The plugin writes the record before it redirects the pod.
// During a migration, pods that kube2iam's rule redirects have no record either.
type stateDirCheck struct {
	stateDir string
	records  *attachment.Index
	pods     func() []broker.Assignment
	log      *slog.Logger
	done     atomic.Bool // the warning was logged or is not needed
}

func newStateDirCheck(stateDir string, records *attachment.Index, pods func() []broker.Assignment, log *slog.Logger) *stateDirCheck {
	return &stateDirCheck{stateDir: stateDir, records: records, pods: pods, log: log}
}

// wrap returns destinations that check each connection, refused ones included: a pod that is redirected
// inside its network namespace is refused if its record is missing.
func (c *stateDirCheck) wrap(destinations imds.Destinations) imds.Destinations {
	return func(source netip.Addr, destination netip.AddrPort) bool {
		if !c.done.Load() {
			c.check(source)
		}
		return destinations(source, destination)
	}
}

func (c *stateDirCheck) check(source netip.Addr) {
	pods := c.pods()
	isPod := slices.ContainsFunc(pods, func(p broker.Assignment) bool { return slices.Contains(p.IPs, source) })
	isAnyRecorded := c.isRecorded(source) || isPod && slices.ContainsFunc(pods, func(p broker.Assignment) bool {
		return slices.ContainsFunc(p.IPs, c.isRecorded)
	})
	if !isPod && !isAnyRecorded {
		return // not a pod of this node, or not known yet
	}
	if c.done.CompareAndSwap(false, true) && !isAnyRecorded {
		c.log.Warn("a pod connects to this proxy, but the state directory has no record of any pod of this node: "+
			"is --state-dir the plugin's stateDir? Or was no pod attached by the plugin yet? "+
			"Until then pods are found by the addresses that they report", "state dir", c.stateDir, "pod's address", source)
	}
}

// isRecorded reports whether an address has a record, readable or not.
func (c *stateDirCheck) isRecorded(ip netip.Addr) bool {
	record, err := c.records.Holder(ip)
	return record != nil || err != nil
}
