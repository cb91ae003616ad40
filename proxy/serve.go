package main

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/credentials"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/imds"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
)

// serve runs the proxy until ctx ends.
func serve(ctx context.Context, o *options, log *slog.Logger) error {
	if err := makeProxyDir(o.stateDir); err != nil {
		return fmt.Errorf("--state-dir: %w", err)
	}
	namespace, err := pidNamespace()
	if err != nil {
		return err
	}
	upstream, err := imds.NewUpstream(o.metadataAddr)
	if err != nil {
		return &usageError{fmt.Errorf("--metadata-addr: %w", err)}
	}
	if err := discover(ctx, o, upstream, log); err != nil {
		return unlessDone(ctx, err)
	}
	if o.rules.BaseARN == "" {
		log.Warn("--base-role-arn is not set: a role is assumed only if its annotation holds an ARN")
	}
	client, err := newKubernetesClient(o)
	if err != nil {
		return err
	}
	sts, err := newSTS(ctx, o, upstream, log)
	if err != nil {
		return unlessDone(ctx, err)
	}
	if o.iptables {
		if err := addNodeRule(o, log); err != nil {
			return err
		}
	}
	records := attachment.NewIndex(attachment.In(o.stateDir))
	c := newComponents(o, client, sts, records, log)
	takeover := newTakeover(o, c, log)
	defer takeover.Close()
	takeover.Begin(ctx)
	log.Info("started", "version", version, "node", o.node, "port", o.appPort, "metrics port", o.metricsPort,
		"metrics address", o.metricsAddress, "sts", sts.Endpoint())

	probes := func(ctx context.Context) error {
		return serveProbes(ctx, probeSocket(o.stateDir, namespace), probeHandler(c, takeover.IsServing), probeInterval, log)
	}
	err = c.run(ctx, func(ctx context.Context) error {
		g, ctx := errgroup.WithContext(ctx)
		g.Go(func() error { return c.logSync(ctx, o.node, log) })
		g.Go(func() error {
			sockets, err := takeover.Listen(ctx)
			if err != nil || sockets == nil {
				return err
			}
			handler := takeover.CloseConnections(newHandler(o, c, upstream, log))
			for _, l := range podListeners(sockets, redirected(o, c, log), o, c, log) {
				g.Go(func() error {
					return serveHTTP(ctx, podServer(handler, log), l, func() { takeover.Drain(l.Len) })
				})
			}
			g.Go(func() error { return serveHTTP(ctx, adminServer(c, o, log), sockets[metricsSocket(o).Name], nil) })
			g.Go(func() error { return watchStateDir(ctx, o.stateDir) })
			return takeover.Serve(ctx, sockets)
		})
		return g.Wait()
	}, probes, tuneGC)
	log.Info("stopped", "error", err)
	return err
}

// newSTS returns the client of STS.
func newSTS(ctx context.Context, o *options, upstream *imds.Upstream, log *slog.Logger) (*credentials.STS, error) {
	clampChained(o, log)
	return credentials.LoadSTS(ctx, credentials.STSConfig{
		Regional: o.regionalSTS, FIPS: o.fipsSTS, Endpoint: o.stsEndpoint, IntermediateRole: o.throughRole,
		SessionName: roles.NodeSessionName(o.node), Partition: partition(o), Region: func(ctx context.Context) (string, error) { return nodeRegion(ctx, upstream, log) },
		MetadataURL: upstream.URL(), UserAgent: "kube2iam-cni/" + version,
	})
}

// newHandler returns the handler of the metadata protocol.
func newHandler(o *options, c *components, upstream *imds.Upstream, log *slog.Logger) *imds.Handler {
	return imds.NewHandler(imds.Config{
		Caller:   func(source netip.Addr, now time.Time) imds.Caller { return c.broker.Caller(source, now) },
		Sessions: imds.NewSessions(sessionKey(o, log)), Upstream: upstream,
		Deny: o.metadataDeny, RequireTokens: o.imdsV2 == "required", Delayed: c.metrics.RequestDelayed,
		Refused: c.metrics.Refused, Log: log,
	})
}

// redirected returns which connections were redirected to the proxy. With --iptables, pods without
// a record are redirected as well.
func redirected(o *options, c *components, log *slog.Logger) imds.Destinations {
	destinations := imds.Redirected(c.records, o.metadataIP)
	if o.iptables {
		return destinations
	}
	return checkStateDir(destinations, o, c.records, c.broker.Assignments, log)
}

// clampChained limits the duration of sessions with --assume-role-arn to what STS allows for a role
// that is assumed with another role's credentials.
func clampChained(o *options, log *slog.Logger) {
	if limit := credentials.MaxChained; o.throughRole != "" && o.rules.Duration > limit {
		log.Warn("STS limits the sessions of chained roles", "requested", o.rules.Duration, "duration", limit)
		o.rules.Duration = limit
	}
}

// unlessDone returns nil if ctx has ended, which explains the error, and err otherwise.
func unlessDone(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}
