package main

import (
	"context"
	"errors"
	"log/slog"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/broker"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/credentials"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/events"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/metrics"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/pods"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
)

// components are the long-lived components that answer pods.
type components struct {
	records    *attachment.Index
	cache      *credentials.Cache
	watch      *pods.Watch
	namespaces *pods.Namespaces // nil without --namespace-restrictions
	broker     *broker.Broker
	events     *events.Recorder
	metrics    *metrics.Metrics

	wasReady atomic.Bool
}

// kubeAPI is the part of the Kubernetes API that the proxy uses.
type kubeAPI interface {
	pods.API
	events.API
}

// newComponents returns the components, connected to each other. The pod watch reports to the
// broker, which asks the resolver, which reads the pod watch: the fan-out breaks this cycle.
func newComponents(o *options, api kubeAPI, sts credentials.Assumer, records *attachment.Index, log *slog.Logger) *components {
	c := &components{records: records}
	watchers := new(fanOut)
	c.watch = pods.NewWatch(pods.WatchConfig{API: api, Node: o.node, Keep: o.rules.Reads, Resync: o.resync, Watcher: watchers})
	c.events = events.New(api, o.node, log)
	c.metrics = metrics.New(version, commit, date, c.watch.Len, c.isReady)
	c.cache = credentials.New(sts, credentials.Config{
		Log: log, Observer: c.metrics, Schedule: credentials.Schedule{ErrorTTL: o.errorTTL},
		Failed: func(holder string, a roles.Assumption, err *credentials.Error) {
			c.broker.AssumeRoleFailed(holder, a, err)
		},
	})
	config := broker.Config{
		Pods: pods.NewResolver(pods.ResolverConfig{
			Records: records, Watch: c.watch, MaxElapsed: o.maxElapsed, MaxInterval: o.maxInterval, ResolveDuplicates: o.resolveDuplicates,
		}),
		Rules: &o.rules, Credentials: c.cache, Recorder: c.events,
	}
	if o.rules.Restriction != nil {
		c.namespaces = pods.NewNamespaces(pods.NamespacesConfig{
			API: api, Keys: o.rules.Restriction.Keys(), Log: log,
			Changed: func(namespace string) { c.broker.NamespaceChanged(namespace) },
		})
		config.Namespaces = c.namespaces
		*watchers = append(*watchers, c.namespaces) // before the broker, which reads the namespaces
	}
	c.broker = broker.New(config)
	*watchers = append(*watchers, c.broker, c.events)
	return c
}

// fanOut passes changes of pods to several watchers, in order.
type fanOut []pods.Watcher

// PodChanged implements pods.Watcher.
func (f *fanOut) PodChanged(p *pods.Pod) {
	for _, w := range *f {
		w.PodChanged(p)
	}
}

// PodGone implements pods.Watcher.
func (f *fanOut) PodGone(p *pods.Pod) {
	for _, w := range *f {
		w.PodGone(p)
	}
}

// run runs the components and the background functions, and serve on top of them, until serve
// returns. They outlive ctx: a request that waits for STS when ctx ends is still answered, and a
// proxy that waits for its clients to close their connections is healthy. One that fails ends
// serve.
func (c *components) run(ctx context.Context, serve func(context.Context) error, background ...func(context.Context) error) error {
	lifetime, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	g, lifetime := errgroup.WithContext(lifetime)
	background = append(background, c.cache.Run, c.watch.Run, c.events.Run)
	if c.namespaces != nil {
		background = append(background, c.namespaces.Run)
	}
	for _, run := range background {
		g.Go(func() error { return run(lifetime) })
	}
	serving, stop := context.WithCancel(ctx)
	defer stop()
	context.AfterFunc(lifetime, stop)
	err := serve(serving)
	end()
	return errors.Join(err, g.Wait())
}

// isReady reports whether the pods of this node were known together with their namespaces once. A
// namespace that is not known later delays its own pods only.
func (c *components) isReady() bool {
	if c.wasReady.Load() {
		return true
	}
	select {
	case <-c.watch.Synced():
	default:
		return false
	}
	if c.namespaces != nil && !c.namespaces.HasSynced() {
		return false
	}
	c.wasReady.Store(true)
	return true
}

// logSync logs when the API server has listed the node's pods, and warns every ten seconds before.
func (c *components) logSync(ctx context.Context, node string, log *slog.Logger) error {
	tick := time.NewTicker(10 * time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			log.Warn("waiting for the API server to list this node's pods", "node", node)
		case <-c.watch.Synced():
			if c.watch.Len() == 0 {
				// A DaemonSet's own pod is listed, so an empty list probably belongs to another
				// node.
				log.Warn("the API server lists no pod of this node: is --node its name?", "node", node)
			} else {
				log.Info("the pods of this node are known", "node", node, "pods", c.watch.Len())
			}
			return nil
		}
	}
}
