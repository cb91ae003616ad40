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

// checkStateDir returns destinations that warn once if --state-dir may not be the plugin's
// stateDir: a pod of this node connects, and no pod of this node has a record. The plugin writes
// the record before it redirects the pod. Refused connections count: a pod that is redirected
// inside its network namespace is refused without a record. During a migration, pods that
// kube2iam's rule redirects have no record either.
func checkStateDir(destinations imds.Destinations, o *options, records *attachment.Index, pods func() []broker.Assignment, log *slog.Logger) imds.Destinations {
	hasRecord := func(ip netip.Addr) bool {
		record, err := records.Holder(ip)
		return record != nil || err != nil // an unreadable record shows that the directory is the right one
	}
	var done atomic.Bool // the warning was logged or is not needed: a connection must not cost this check
	check := func(source netip.Addr) {
		var ips []netip.Addr
		for _, p := range pods() {
			ips = append(ips, p.IPs...)
		}
		switch isPod := slices.Contains(ips, source); {
		case hasRecord(source), isPod && slices.ContainsFunc(ips, hasRecord):
			done.Store(true)
		case isPod && done.CompareAndSwap(false, true):
			log.Warn("a pod connects to this proxy, but the state directory has no record of any pod of this node: "+
				"is --state-dir the plugin's stateDir? Or was no pod attached by the plugin yet? "+
				"Until then pods are found by the addresses that they report", "state dir", o.stateDir, "pod's address", source)
		}
	}
	return func(source netip.Addr, destination netip.AddrPort) bool {
		if !done.Load() {
			check(source)
		}
		return destinations(source, destination)
	}
}
