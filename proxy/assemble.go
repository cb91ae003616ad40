package main

import (
	"context"
	"log/slog"
	"time"

	"k8s.io/client-go/kubernetes"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/broker"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/credentials"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/metrics"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/pods"
)

// assemble makes the parts and joins them. The watch tells the broker and the broker asks the resolver, which asks the
// watch: the relay in between lets each be made before the next.
func assemble(o *options, client kubernetes.Interface, sts credentials.Assumer, records *attachment.Index, log *slog.Logger) (*parts, error) {
	p := new(parts)
	relay := new(relay)
	keep := func(key string) bool { return key == o.rules.RoleKey || key == o.rules.ExternalIDKey }
	var err error
	p.watch, err = pods.NewWatch(pods.WatchConfig{Client: client, Node: o.node, Keep: keep, Resync: o.resync, Watcher: relay, Log: log})
	if err != nil {
		return nil, err
	}
	p.metrics = metrics.New(version, commit, date, p.watch.Len, p.ready)
	p.cache = credentials.New(sts, credentials.Config{Log: log, Observer: p.metrics, ErrorTTL: o.errorTTL})
	config := broker.Config{
		Pods: pods.NewResolver(pods.ResolverConfig{
			Records: records, Watch: p.watch, Client: client, Node: o.node, Keep: keep,
			MaxElapsed: o.maxElapsed, MaxInterval: o.maxInterval, AskDuplicates: o.resolveDuplicates,
		}),
		Rules: &o.rules, Credentials: p.cache, Log: log,
	}
	if o.rules.Restriction != nil {
		p.namespaces, err = pods.NewNamespaces(pods.NamespacesConfig{
			Client: client, Key: o.rules.Restriction.Key, Resync: o.resync, Changed: relay.NamespaceChanged, Log: log,
		})
		if err != nil {
			return nil, err
		}
		config.Namespaces = p.namespaces
	}
	p.broker = broker.New(config)
	relay.Broker = p.broker
	return p, nil
}

// relay is the broker, named before it is made.
type relay struct{ *broker.Broker }

// reportState logs when the node's pods are known, keeps saying so while they are not, and says where pods cannot be told
// apart as well as they should.
func reportState(ctx context.Context, p *parts, records *attachment.Index, o *options, log *slog.Logger) error {
	if !records.Present() {
		log.Warn("no pod of this node is on record: pods are found by what they report, until the plugin attaches one. "+
			"Is --state-dir the plugin's stateDir?", "state dir", o.stateDir)
	}
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
