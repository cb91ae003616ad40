package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/hostlink"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/redirect"
)

// Agent keeps the node as the records say. What it finds wrong it looks at again under a lock that holds the plugin off, so
// that no ADD or DEL under way is taken for a fault; where nothing is wrong it only looks.
type Agent struct {
	*Node
	// Cache is libcni's, by which pods are adopted that came before the plugin.
	Cache Cache
	// Links are the host's interfaces, by index (hostlink.Links).
	Links func() (map[int]string, error)
	// Filtered are those of the links whose packets something sees before netfilter does (hostlink.Filtered).
	Filtered func(links map[int]string) (map[int]bool, error)
	// Addresses are those of an interface in a network namespace (hostlink.Addresses).
	Addresses func(netnsPath, ifName string) ([]netip.Addr, error)
	// Cut ends connections from pods to a service that were not redirected, and tells how many (conntrack.go).
	Cut func(service netip.AddrPort) (int, error)
	// Changes says that somebody changed rules of the kernel's nftables, iptables-nft's included. It may be nil.
	Changes <-chan struct{}
	// Interval is the time between two rounds where nothing says that anything changed.
	Interval time.Duration
	// Repaired is called in each round, with the error of making the rules what they should be: the guard stands from the first
	// nil on. It may be nil.
	Repaired func(error)

	looked bool         // in all forms, once
	did    bool         // something, in this round
	probed map[int]bool // links, by index, behind whose filter a packet was sent
	quiet  *quiet       // the log, from the first round on
}

// NewAgent is the agent of a node, with the host's own interfaces, namespaces and connections. Of the cache, what it asks of
// the host is filled in.
func NewAgent(n *Node, cache Cache, interval time.Duration) *Agent {
	cache.Addresses, cache.HostLink = hostlink.Addresses, hostlink.HostSide
	return &Agent{
		Node: n, Cache: cache, Links: hostlink.Links, Filtered: hostlink.Filtered, Addresses: hostlink.Addresses, Cut: CutDirect, Interval: interval,
	}
}

// settle is how long the agent waits after a change that somebody made: others often follow it. Where a look showed that
// nothing was wrong (the plugin's DELs are such changes, and its own), it rests before it looks for the next one.
const (
	settle = 50 * time.Millisecond
	rest   = time.Second
)

// Run makes rounds until ctx ends. A round that fails is logged, and the next comes all the same. It leaves everything as it
// is when it ends.
func (a *Agent) Run(ctx context.Context) error {
	for {
		a.did = false
		if err := a.Round(ctx); err != nil && ctx.Err() == nil {
			a.Log.Error("a round failed, in part or whole", "error", err)
		}
		a.Close()
		ended := time.Now()
		next := time.NewTimer(a.Interval)
		select {
		case <-ctx.Done():
			next.Stop()
			return nil
		case <-next.C:
			continue
		case <-a.Changes:
			next.Stop()
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(a.pause(time.Since(ended))):
		}
		select { // what came meanwhile is seen by the round
		case <-a.Changes:
		default:
		}
	}
}

// pause is how long to wait after a change that came so long after the last round.
func (a *Agent) pause(since time.Duration) time.Duration {
	if a.did {
		return settle
	}
	return max(settle, rest-since)
}

// Round looks at everything once and puts right what is wrong: records and rules first, so that the node is guarded before
// anything else, then the pods that have neither.
func (a *Agent) Round(ctx context.Context) error {
	if a.quiet == nil {
		a.quiet = newQuiet(a.Log.Handler())
		a.Log = slog.New(a.quiet)
	}
	a.quiet.begin()
	mended, err := a.records().Mend(ctx)
	a.said("mended the state directory", mended)
	errs := []error{err, a.outdated(ctx)}
	s, err := a.repair(ctx)
	if a.Repaired != nil && ctx.Err() == nil {
		a.Repaired(err)
	}
	if s != nil {
		a.repairInPods(s)
	}
	errs = append(errs, err, a.recheck(ctx))
	if a.adopt(ctx) > 0 {
		errs = append(errs, a.cut())
	}
	return errors.Join(errs...)
}

// repair makes records and rules on the host agree with the node and with each other. It returns what it saw last, or nil if it
// saw nothing.
func (a *Agent) repair(ctx context.Context) (*snapshot, error) {
	s, err := a.state(nil)
	if err != nil {
		return nil, err
	}
	did, err := s.repair(ctx, true)
	if err == nil && len(did) == 0 && len(s.gone) == 0 {
		a.looked = true
		return s, nil
	}
	// Again, while nobody changes anything.
	unlock, err := a.exclusive(ctx)
	if err != nil {
		return s, err
	}
	defer unlock()
	before := s
	if s, err = a.state(before); err != nil {
		return before, err
	}
	errs := []error{a.collect(ctx, s)}
	did, err = s.repair(ctx, false)
	a.said("repaired the node's rules", did)
	errs = append(errs, err)
	if slices.ContainsFunc(did, redirect.IsMissing) {
		// While the guard was away, connections may have been made that it would have refused.
		errs = append(errs, a.cut())
	}
	err = errors.Join(errs...)
	// Rules of those that are gone may be left where nothing else is looked for any more.
	a.looked = err == nil && (a.looked || s.wanted.Everywhere)
	return s, err
}

// collect deletes the records of attachments that are gone. Their rules go with the repair that follows, to which a rule without
// a record is a stale one: all in one run of a command, where a DEL, for which the record comes last, takes one for each. Nobody
// else changes anything meanwhile, and after a death in between the next round finds the rules by their comments.
func (a *Agent) collect(ctx context.Context, s *snapshot) error {
	var errs []error
	for _, r := range s.gone {
		a.Log.Info("collecting an attachment that is gone", "attachment", r.ID(), "namespace", r.Pod.Namespace, "pod", r.Pod.Name)
		wait := a.destroySocketsOfRemoved(r)
		errs = append(errs, a.records().Delete(ctx, r.ContainerID, r.IfName))
		wait()
		s.wanted.Everywhere = true
	}
	return errors.Join(errs...)
}

// snapshot is the records, and what they ask of the node.
type snapshot struct {
	*Agent
	live, gone []*attachment.Record
	wanted     redirect.Wanted
}

// state returns the records, and what they ask of the node. With before it does not look into pods, but relies on that earlier
// look, for a caller that holds a lock.
func (a *Agent) state(before *snapshot) (*snapshot, error) {
	chosen, err := a.rules.Choose(a.Backend)
	if err != nil {
		return nil, about(Rules, err)
	}
	records, err := a.records().List()
	if err != nil && records == nil {
		return nil, about(State, err) // what there is is not known: nothing may be taken for gone
	}
	if err != nil {
		// Nobody is served by such a record, and no rule is kept for it.
		a.Log.Warn("records that cannot be read", "error", err)
	}
	links, err := a.Links()
	if err != nil {
		return nil, err
	}
	s := &snapshot{Agent: a}
	for _, r := range records {
		var gone bool
		var err error
		switch {
		case r.HostLink.Index != 0:
			gone = links[r.HostLink.Index] != r.HostLink.Name
		case before != nil:
			gone = before.wasGone(r)
		default:
			gone, err = a.isGoneInPod(r)
		}
		if err != nil {
			a.Log.Warn("an attachment of which it is not known whether it is gone; it stays", "attachment", r.ID(), "error", err)
		}
		if gone {
			s.gone = append(s.gone, r)
		} else {
			s.live = append(s.live, r)
		}
	}
	s.wanted = redirect.Wanted{
		Base: a.base(s.live...), Chosen: chosen.Form(), Everywhere: !a.looked, Attachments: make(map[redirect.Form][]redirect.Attachment),
	}
	for _, r := range s.live {
		if r.Datapath != attachment.DatapathPod {
			form := redirect.Form(r.Backend)
			s.wanted.Attachments[form] = append(s.wanted.Attachments[form], RulesOf(r))
		}
	}
	return s, nil
}

// isGoneInPod reports whether the interface of an attachment without a host link has none of its addresses any more. How long
// this takes depends on the pod, so no caller holds a lock.
func (a *Agent) isGoneInPod(r *attachment.Record) (bool, error) {
	held, err := a.Addresses(r.Netns, r.IfName)
	if err != nil {
		return false, err
	}
	return !holdsOne(held, r.IPs), nil
}

// wasGone reports whether the snapshot has that very record among those that are gone. An older answer is safe here: an interface
// that was gone comes back only with an ADD, which writes another record (Created), and one that has gone since is collected in
// the next round. A pod that takes its own address away for a moment only harms itself.
func (s *snapshot) wasGone(r *attachment.Record) bool {
	return slices.ContainsFunc(s.gone, func(g *attachment.Record) bool { return g.ID() == r.ID() && g.Created.Equal(r.Created) })
}

func (s *snapshot) repair(ctx context.Context, dry bool) ([]string, error) {
	return s.rules.Repair(ctx, s.wanted, dry)
}

// repairInPods makes the missing redirections inside pods, and removes those of attachments that are gone. How long this takes
// depends on the pods, within bounds. So the node is guarded and the agent ready before, and no lock is held.
func (a *Agent) repairInPods(s *snapshot) {
	var errs []error
	for _, r := range s.gone {
		if r.Datapath == attachment.DatapathPod {
			errs = append(errs, a.remove(r))
		}
	}
	for _, r := range s.live {
		if r.Datapath != attachment.DatapathPod {
			continue
		}
		missing, err := a.rules.MissingInPod(RulesOf(r))
		if err == nil && len(missing) > 0 {
			a.Log.Info("repairing a redirection inside a pod", "attachment", r.ID(), "namespace", r.Pod.Namespace, "pod", r.Pod.Name)
			err = a.addInPod(RulesOf(r))
		}
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		a.Log.Warn("redirections inside pods cannot be made or removed", "error", err)
	}
}

// exclusive holds off the plugin's changes.
func (a *Agent) exclusive(ctx context.Context) (func(), error) {
	return a.change(ctx, attachment.Lock)
}

// cut ends connections to the services that came about without a redirection.
func (a *Agent) cut() error {
	var errs []error
	for _, service := range []netip.AddrPort{a.metadataFor(a.MetadataIP), a.metadataFor(metadata6)} {
		n, err := a.Cut(service)
		if err != nil {
			errs = append(errs, fmt.Errorf("tracked connections to %s: %w", service, err))
		}
		if n > 0 {
			a.Log.Info("ended connections that were not redirected", "service", service, "connections", n)
		}
	}
	return errors.Join(errs...)
}

// maxSaid bounds how much of what was done is said in one line.
const maxSaid = 10

func (a *Agent) said(what string, did []string) {
	if len(did) == 0 {
		return
	}
	a.did = true
	a.Log.Info(what, "changes", len(did), "first", did[:min(len(did), maxSaid)])
}
