package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/broker"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/credentials"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/events"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/handover"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/imds"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/metrics"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/pods"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
)

// serve runs the proxy until ctx ends: it makes each part, joins them, and starts those that live.
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
		return ended(ctx, err)
	}
	if o.rules.BaseARN == "" {
		log.Warn("--base-role-arn is not set: only annotations that hold a whole ARN can be honoured")
	}
	client, err := kubernetesClient(o)
	if err != nil {
		return err
	}
	clampChained(o, log)
	sts, err := credentials.NewSTS(ctx, credentials.STSConfig{
		Regional: o.regionalSTS, FIPS: o.fipsSTS, Endpoint: o.stsEndpoint, IntermediateRole: o.throughRole, SessionName: roles.NodeSessionName(o.node),
		Partition: partition(o), Region: region(upstream, log), MetadataURL: upstream.URL(), UserAgent: "kube2iam-cni/" + version,
	})
	if err != nil {
		return ended(ctx, err)
	}
	if o.iptables {
		if err := addNodeRule(o, log); err != nil {
			return err
		}
	}

	records := attachment.NewIndex(attachment.In(o.stateDir))
	parts, err := assemble(o, client, sts, records, log)
	if err != nil {
		return err
	}
	takeover := newTakeover(o, parts, log)
	defer takeover.end()
	if err := takeover.begin(ctx); err != nil {
		return err
	}

	handler := imds.NewHandler(imds.Config{
		Caller:   func(source netip.Addr, now time.Time) imds.Caller { return parts.broker.Caller(source, now) },
		Sessions: imds.NewSessions(sessionKey(o, log)), Upstream: upstream,
		Deny: o.metadataDeny, RequireTokens: o.requireTokens, Delayed: parts.metrics.RequestDelayed,
		Refused: parts.metrics.Refused, Log: log,
	})
	log.Info("started", "version", version, "node", o.node, "port", o.appPort, "metrics port", o.metricsPort, "metrics address", o.metricsAddress, "sts", sts.Endpoint())

	// Probes are answered until all else has ended: a proxy that waits for its clients to leave is
	// not unhealthy.
	probed, end := context.WithCancel(context.WithoutCancel(ctx))
	var probes sync.WaitGroup
	probes.Go(func() {
		serveProbes(probed, probeSocket(o.stateDir, namespace), probeHandler(parts, &takeover.serves), probeLook, log)
	})
	err = live(ctx, parts, func(ctx context.Context) error {
		g, ctx := errgroup.WithContext(ctx)
		g.Go(func() error { return reportState(ctx, parts, o, log) })
		g.Go(func() error { return keepSmall(ctx) })
		g.Go(func() error {
			sockets, err := takeover.sockets(ctx)
			if err != nil || sockets == nil {
				return err
			}
			let := destinations(records, o.metadataIP)
			if !o.iptables { // that rule redirects pods without a record
				let = newStateDirCheck(o.stateDir, records, parts.broker.Assignments, log).watching(let)
			}
			for _, app := range podListeners(sockets, let, o, parts, log) {
				g.Go(func() error {
					return serveHTTP(ctx, podServer(takeover.draining(handler), log), app, takeover.drained(app))
				})
			}
			g.Go(func() error { return takeover.stays(ctx) })
			g.Go(func() error { return serveHTTP(ctx, adminServer(parts, o, log), sockets[1], nil) })
			return takeover.serve(ctx, sockets)
		})
		return g.Wait()
	})
	end()
	probes.Wait()
	log.Info("stopped", "error", err)
	return err
}

// podListeners returns the listeners of all sockets but the admin port's. They share the limits of connections and requests.
func podListeners(sockets []*handover.Listener, allowed imds.Destinations, o *options, p *parts, log *slog.Logger) []*imds.Listener {
	connections := imds.NewConnections(o.podRequests)
	var all []*imds.Listener
	for i, l := range sockets {
		if i != 1 {
			all = append(all, imds.NewListener(l, allowed, p.broker.Identity, connections, p.metrics.ConnectionRefused, log))
		}
	}
	return all
}

// clampChained keeps sessions as short as STS has them where a role is assumed by another's credentials, and says so.
func clampChained(o *options, log *slog.Logger) {
	if most := credentials.MaxChained; o.throughRole != "" && o.rules.Duration > most {
		log.Warn("sessions are shorter than asked for: STS gives chained roles no more", "asked", o.rules.Duration, "duration", most)
		o.rules.Duration = most
	}
}

// ended is no error where what failed did so because the process is told to end.
func ended(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// live runs the parts that answer, and serve over them until ctx ends. The parts outlive what serves: a request that waits
// for STS when ctx ends still gets its answer.
func live(ctx context.Context, p *parts, serve func(context.Context) error) error {
	life, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	g, life := errgroup.WithContext(life)
	g.Go(func() error { return p.cache.Run(life) })
	g.Go(func() error { return p.watch.Run(life) })
	g.Go(func() error { return p.events.Run(life) })
	if p.namespaces != nil {
		g.Go(func() error { return p.namespaces.Run(life) })
	}
	serving, stop := context.WithCancel(ctx)
	defer stop()
	context.AfterFunc(life, stop) // a part that fails ends the service too
	err := serve(serving)
	end()
	return errors.Join(err, g.Wait())
}

func port(p uint16) string { return strconv.Itoa(int(p)) }

// sessionKey is the key of session tokens, kept in the proxy's directory so that tokens outlive this process. Without it the
// proxy still serves, and its tokens end with it.
func sessionKey(o *options, log *slog.Logger) []byte {
	key, err := imds.LoadKey(filepath.Join(proxyDir(o.stateDir), "session.key"))
	if err != nil {
		log.Warn("session tokens will not outlive this process: their key cannot be kept", "error", err)
		return imds.NewKey()
	}
	return key
}

// destinations lets through what was bound for the metadata service's addresses, or for another one that the record of the
// source's attachment says was redirected. An attachment that is redirected inside its pod comes without a redirection that
// this node's kernel knows of: from it, and from it alone, connections are taken that were dialled here.
func destinations(records *attachment.Index, configured netip.Addr) imds.Destinations {
	const httpPort = 80
	known := []netip.AddrPort{
		netip.AddrPortFrom(netip.MustParseAddr("169.254.169.254"), httpPort),
		netip.AddrPortFrom(netip.MustParseAddr("fd00:ec2::254"), httpPort),
	}
	if configured.IsValid() && !configured.IsLoopback() {
		known = append(known, netip.AddrPortFrom(configured, httpPort))
	}
	return func(source netip.Addr, destination netip.AddrPort) bool {
		if slices.Contains(known, destination) {
			return true
		}
		record, err := records.Holder(source)
		if err != nil || record == nil {
			return false
		}
		return slices.ContainsFunc(record.Redirects, func(r attachment.Redirect) bool {
			inPod := record.Datapath == attachment.DatapathPod && r.Proxy == destination
			return r.Source == source && (inPod || r.Metadata == destination)
		})
	}
}

// parts are what lives as long as the process.
type parts struct {
	records    *attachment.Index
	cache      *credentials.Cache
	watch      *pods.Watch
	namespaces *pods.Namespaces // nil where namespaces restrict nothing
	broker     *broker.Broker
	events     *events.Recorder
	metrics    *metrics.Metrics

	known atomic.Bool
}

// ready tells whether the pods of this node are known, and were once with all their namespaces: one that comes later is waited for
// by its pods only.
func (p *parts) ready() bool {
	if p.known.Load() {
		return true
	}
	if !closed(p.watch.Synced()) || p.namespaces != nil && !p.namespaces.Shown() {
		return false
	}
	p.known.Store(true)
	return true
}

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// podServer serves pods. Every read and write is bounded: its clients are whoever runs in a pod.
func podServer(h http.Handler, log *slog.Logger) *http.Server {
	return &http.Server{
		Handler:     h,
		ConnContext: imds.ConnContext,
		// For the whole request, which is its header and no body worth the name; one deadline, for each costs time. What a
		// client does not take of an answer is bounded by the Listener and by Upstream.
		ReadTimeout:    5 * time.Second,
		IdleTimeout:    2 * time.Minute,
		MaxHeaderBytes: 4 << 10,
		// OPTIONS * is answered like any other method.
		DisableGeneralOptionsHandler: true,
		ErrorLog:                     slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
}

// serveHTTP serves until ctx ends, then lets requests finish for a moment; after drain, if there is one, which may wait for more.
func serveHTTP(ctx context.Context, s *http.Server, l net.Listener, drain func()) error {
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		if drain != nil {
			drain()
		}
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		if s.Shutdown(grace) != nil {
			s.Close()
		}
	})
	err := s.Serve(l)
	if errors.Is(err, http.ErrServerClosed) {
		<-stopped
		return nil
	}
	stop()
	return err
}
