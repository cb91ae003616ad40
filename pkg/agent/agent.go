// Package agent reconciles the rules of a node with the records. It adopts pods that were created
// before the plugin was chained, restores flushed rules, and collects attachments without a DEL.
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attach"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/dedup"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/hostlink"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/nft"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/rules"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/uplink"
)

// Config configures an agent.
type Config struct {
	Settings attach.Settings
	Cache    Cache
	// Interval is the time between two rounds without a notification.
	Interval time.Duration
	// OnRepaired is called in each round with the result of repairing guard, records and rules. The
	// guard exists from the first nil on. It is optional.
	OnRepaired func(error)
}

// System is the seam to the operating system.
type System struct {
	attach.System
	// Links returns the names of the host's interfaces, by index.
	Links func() (map[int]string, error)
	// BypassCandidates is hostlink.BypassCandidates.
	BypassCandidates func(links map[int]string) (map[int]bool, error)
	// Addresses returns those of an interface in a network namespace; none if it does not exist.
	Addresses func(netnsPath, ifName string) ([]netip.Addr, error)
	// HostSide returns the name of the host side of an interface in a network namespace, or "".
	HostSide func(netnsPath, ifName string) string
	// CutConnections ends the pods' connections to a service that are not redirected, and returns
	// how many there were.
	CutConnections func(service netip.AddrPort) (int, error)
	// WatchRules calls notify when rules were removed that can be the agent's, until ctx ends.
	WatchRules func(ctx context.Context, notify func()) error
	// NewUplinks loads the guard of the uplinks, RemoveUplinks is the function of that name, and
	// WatchUplinks is uplink.Watch.
	NewUplinks    func(metadata netip.Addr) (Uplinks, error)
	RemoveUplinks func() error
	WatchUplinks  func(ctx context.Context, metadata netip.Addr, notify func()) error
}

// Host returns the host's operating system.
func Host() System {
	return System{
		System: attach.Host(), Links: hostlink.Links, BypassCandidates: hostlink.BypassCandidates, Addresses: hostlink.Addresses, HostSide: hostlink.HostSide,
		CutConnections: cutConnections, WatchRules: watchRules, WatchUplinks: uplink.Watch,
		NewUplinks: newUplinks, RemoveUplinks: RemoveUplinks,
	}
}

// Agent reconciles the rules of a node with the records. It compares them without a lock. On a
// difference it takes the exclusive lock and compares again, because a running ADD or DEL looks
// like a difference.
type Agent struct {
	Config
	System
	node    *attach.Node
	log     *slog.Logger
	dedup   *dedup.Handler
	trigger chan struct{}
	uplinks Uplinks // nil until the first round, and on a kernel that cannot guard them
	// areUplinksRemoved says that an agent without a guard has removed that of an earlier one.
	areUplinksRemoved bool

	attachPod func(context.Context, *attachment.Record) error // Rules.AttachPod; tests wrap it

	hasChanged bool         // whether this round changed anything
	probed     map[int]bool // the bypass candidates that were probed, by index
}

// New returns an agent. All its loggers are one that logs a condition once while it persists.
func New(c Config, sys System, log *slog.Logger) *Agent {
	handler := dedup.New(log.Handler(), 0)
	log = slog.New(handler)
	node := attach.New(c.Settings, sys.System, log)
	return &Agent{
		Config: c, System: sys, node: node, log: log, dedup: handler,
		trigger: make(chan struct{}, 1), attachPod: node.Rules.AttachPod, probed: make(map[int]bool),
	}
}

// Trigger makes a round begin soon.
func (a *Agent) Trigger() {
	select {
	case a.trigger <- struct{}{}:
	default: // a round is already due
	}
}

// Close closes the netlink connection of the rules, and the guard of the uplinks. The guard stays
// in the kernel.
func (a *Agent) Close() {
	a.node.Close()
	if a.uplinks != nil {
		a.uplinks.Close()
		a.uplinks = nil
	}
}

// settleTime is the time between a notification and the round: other changes often follow.
// minInterval is the time between two rounds when the first of them found nothing: the plugin's
// DELs cause notifications, too.
const (
	settleTime  = 50 * time.Millisecond
	minInterval = time.Second
)

// Run makes rounds until ctx ends. It logs a round that fails. It leaves rules and records when it
// ends.
func (a *Agent) Run(ctx context.Context) error {
	var watch sync.WaitGroup
	defer watch.Wait()
	watch.Go(func() {
		if err := a.WatchRules(ctx, a.Trigger); err != nil && ctx.Err() == nil {
			a.log.Warn("the kernel does not notify of changed rules; rounds find them", "interval", a.Interval, "error", err)
		}
	})
	watch.Go(func() {
		if err := a.WatchUplinks(ctx, a.node.MetadataIP, a.Trigger); err != nil && ctx.Err() == nil {
			a.log.Warn("the kernel does not notify of new uplinks; rounds find them", "interval", a.Interval, "error", err)
		}
	})
	for {
		if err := a.Round(ctx); err != nil && ctx.Err() == nil {
			a.log.Error("a round failed, in part or whole", "error", err)
		}
		a.node.Close()
		ended := time.Now()
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(a.Interval):
			continue
		case <-a.trigger:
		}
		wait := settleTime
		if !a.hasChanged {
			wait = max(settleTime, minInterval-time.Since(ended))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
		select { // the round finds what has changed until now
		case <-a.trigger:
		default:
		}
	}
}

// Round repairs the node once. The guards come first, then records and rules, then what depends on
// pods.
func (a *Agent) Round(ctx context.Context) error {
	a.dedup.NextRound()
	a.hasChanged = false
	unguarded := a.guardUplinks()
	guard, err := a.node.Rules.MakeGuard(ctx)
	a.logChanges("made the guard", texts(guard))
	s, changes, failed := a.repair(ctx)
	err = errors.Join(unguarded, err, failed)
	// Without the guard or a redirection, pods may have connected to the metadata service.
	if slices.ContainsFunc(slices.Concat(guard, changes), func(c rules.Change) bool { return c.Kind == nft.Missing }) {
		err = errors.Join(err, a.cut())
	}
	if a.OnRepaired != nil && ctx.Err() == nil {
		a.OnRepaired(err)
	}
	if s == nil {
		return err
	}
	a.repairInPods(ctx, s)
	err = errors.Join(err, a.checkBypass(ctx, s))
	if a.adopt(ctx, s.attached) > 0 {
		err = errors.Join(err, a.cut())
	}
	return err
}

// cut ends connections to the metadata services that are not redirected.
func (a *Agent) cut() error {
	var errs []error
	for _, ip := range []netip.Addr{a.node.MetadataIP, attachment.MetadataIPv6} {
		service := a.node.Metadata(ip)
		n, err := a.CutConnections(service)
		if err != nil {
			errs = append(errs, fmt.Errorf("tracked connections to %s: %w", service, err))
		}
		if n > 0 {
			a.log.Info("ended connections that were not redirected", "service", service, "connections", n)
		}
	}
	return errors.Join(errs...)
}

// maxLogged bounds the changes in one log line.
const maxLogged = 10

func (a *Agent) logChanges(message string, changes []string) {
	if len(changes) == 0 {
		return
	}
	a.hasChanged = true
	a.log.Info(message, "changes", len(changes), "first", changes[:min(len(changes), maxLogged)])
}

func texts(changes []rules.Change) []string {
	var texts []string
	for _, c := range changes {
		texts = append(texts, c.String())
	}
	return texts
}
