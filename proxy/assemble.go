package main

import (
	"context"
	"log/slog"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/broker"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/credentials"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/events"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/metrics"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/pods"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
)

// assemble makes the parts and joins them. The watch tells the broker and the broker asks the resolver, which asks the
// watch: the relay in between lets each be made before the next.
func assemble(o *options, client cluster, sts credentials.Assumer, records *attachment.Index, log *slog.Logger) (*parts, error) {
	p := &parts{records: records}
	relay := new(relay)
	var err error
	p.watch, err = pods.NewWatch(pods.WatchConfig{API: client, Node: o.node, Keep: o.rules.Reads, Resync: o.resync, Watcher: relay, Log: log})
	if err != nil {
		return nil, err
	}
	p.events = events.New(client, o.node, log)
	p.metrics = metrics.New(version, commit, date, p.watch.Len, p.ready)
	p.cache = credentials.New(sts, credentials.Config{
		Log: log, Observer: p.metrics, Schedule: credentials.Schedule{ErrorTTL: o.errorTTL},
		Failed: func(holder string, a roles.Assumption, err *credentials.Error) {
			p.broker.AssumeRoleFailed(holder, a, err)
		},
	})
	config := broker.Config{
		Pods: pods.NewResolver(pods.ResolverConfig{
			Records: records, Watch: p.watch, API: client, Node: o.node, Keep: o.rules.Reads,
			MaxElapsed: o.maxElapsed, MaxInterval: o.maxInterval, AskDuplicates: o.resolveDuplicates,
		}),
		Rules: &o.rules, Credentials: p.cache, Recorder: p.events, Log: log,
	}
	if o.rules.Restriction != nil {
		p.namespaces = pods.NewNamespaces(pods.NamespacesConfig{
			API: client, Keys: o.rules.Restriction.Keys(), Changed: func(namespace string) { p.broker.NamespaceChanged(namespace) }, Log: log,
		})
		config.Namespaces = p.namespaces
		relay.watchers = append(relay.watchers, p.namespaces) // before the broker, which asks it
	}
	p.broker = broker.New(config)
	relay.watchers = append(relay.watchers, p.broker, p.events)
	return p, nil
}

// cluster is what of the Kubernetes API is asked, as kube.Client does.
type cluster interface {
	pods.API
	events.API
}

// relay tells several watchers, in their order.
type relay struct{ watchers []pods.Watcher }

// PodChanged implements pods.Watcher.
func (r *relay) PodChanged(p *pods.Pod) {
	for _, w := range r.watchers {
		w.PodChanged(p)
	}
}

// PodGone implements pods.Watcher.
func (r *relay) PodGone(p *pods.Pod) {
	for _, w := range r.watchers {
		w.PodGone(p)
	}
}

// reportState logs when the node's pods are known, and keeps saying so while they are not.
func reportState(ctx context.Context, p *parts, o *options, log *slog.Logger) error {
	tick := time.NewTicker(10 * time.Second)
	defer tick.Stop()
	synced := p.watch.Synced()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			log.Warn("still waiting for the API server to list this node's pods", "node", o.node)
		case <-synced:
			if p.watch.Len() == 0 {
				// A DaemonSet's own pod is on the list, so an empty one is most likely another node's.
				log.Warn("the API server knows no pod on this node: is --node its name?", "node", o.node)
			} else {
				log.Info("the pods of this node are known", "node", o.node, "pods", p.watch.Len())
			}
			return nil
		}
	}
}
