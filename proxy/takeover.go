package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/handover"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/imds"
)

// takeover is how this proxy comes by its ports, from the proxy that serves this node now if there is one, and how the next one gets them.
type takeover struct {
	*options
	parts *parts
	log   *slog.Logger
	path  string

	patience time.Duration // with whoever has a port

	from   *handover.Predecessor // nil where nobody served
	serves atomic.Bool           // whether this proxy has its sockets, or had them before another took over
	handed atomic.Bool           // whether another proxy has taken over
}

// handoverSocket is the unix socket, by the state directory.
func handoverSocket(stateDir string) string {
	return filepath.Join(proxyDir(stateDir), "handover.sock")
}

func newTakeover(o *options, p *parts, log *slog.Logger) *takeover {
	return &takeover{options: o, parts: p, log: log, path: handoverSocket(o.stateDir), patience: portPatience}
}

// begin finds who serves, and takes over its credentials: what pods hold need not be asked for again, and STS may be away.
func (t *takeover) begin(ctx context.Context) (err error) {
	if t.from, err = handover.Find(ctx, t.path); err != nil {
		t.log.Warn("a proxy that serves already cannot be asked", "error", err)
		return nil
	}
	if t.from == nil {
		return nil
	}
	t.log.Info("another proxy serves; taking over as soon as the pods are known and their credentials there", "credentials", t.credentials())
	return nil
}

// credentials takes over those that the predecessor has, and tells how many.
func (t *takeover) credentials() int {
	state, err := t.from.State()
	taken := 0
	if err == nil {
		taken, err = t.parts.cache.Import(state)
	}
	if err != nil {
		t.log.Warn("the credentials of the proxy that serves already are not taken over", "error", err)
	}
	return taken
}

// end lets go of a predecessor, which goes on if it still runs.
func (t *takeover) end() {
	if t.from != nil {
		t.from.Close()
	}
}

const (
	// warm is how long credentials are waited for that the predecessor did not have: STS may be away.
	warm = 20 * time.Second
	// again is how soon a port is tried again that somebody else holds, at first, and slowly how soon in the end.
	again, slowly = 50 * time.Millisecond, 2 * time.Second
	// portPatience is more than a proxy that was told to end takes for that.
	portPatience = time.Minute
)

// sockets are those to serve on: the pods', the admin port's, and behind them the pods' former ones, which pods that started before the
// port was changed are still redirected to. They are the predecessor's once this proxy knows what it has to, or this process's own where
// nobody serves, or another port. They are nil where ctx ended before.
func (t *takeover) sockets(ctx context.Context) (sockets []*handover.Listener, err error) {
	var since time.Time // when a port was another's first
	refused := ""       // what was said last of a predecessor
	for wait := again; ; wait = min(2*wait, slowly) {
		if t.from != nil {
			if !t.ready(ctx) {
				return nil, nil
			}
			// Once more: what nobody held was forgotten if the pods were long in coming, and the predecessor has renewed some since.
			t.credentials()
			if sockets, err = t.adopt(ctx); err == nil {
				return sockets, nil
			}
			if said := err.Error(); said != refused {
				t.log.Warn("the proxy that serves did not hand over", "error", err)
				refused = said
			}
			t.from.Close()
			t.from = nil
		}
		if sockets, err = t.listen(ctx, nil); err == nil {
			return sockets, nil
		}
		switch now := time.Now(); {
		case !errors.Is(err, unix.EADDRINUSE):
			return nil, err
		case since.IsZero():
			t.log.Warn("another process has a port; waiting for it", "error", err)
			since = now
		case now.Sub(since) > t.patience:
			return nil, fmt.Errorf("another process has a port and does not hand it over through %s: does it run with another --state-dir? %w", t.path, err)
		}
		select {
		case <-ctx.Done():
			return nil, nil
		case <-time.After(wait):
		}
		if t.from, err = handover.Find(ctx, t.path); err != nil {
			t.from = nil
		}
	}
}

// adopt takes the predecessor's sockets over, each by its address, and opens those that it does not have.
func (t *takeover) adopt(ctx context.Context) ([]*handover.Listener, error) {
	given, err := t.from.Sockets()
	if err != nil {
		return nil, err
	}
	if len(given) < 2 {
		for _, l := range given {
			l.Close()
		}
		return nil, fmt.Errorf("the predecessor has %d sockets", len(given))
	}
	return t.listen(ctx, given)
}

// maxFormer bounds the sockets of former ports.
const maxFormer = 4

// listen is the sockets of the addresses that this proxy is to serve, all or none: those that were given, in the order of sockets, and this
// process's own. What was given and is not among them is closed.
func (t *takeover) listen(ctx context.Context, given []*handover.Listener) (sockets []*handover.Listener, err error) {
	defer func() {
		for _, l := range given {
			if !slices.Contains(sockets, l) {
				l.Close()
			}
		}
	}()
	var pods, admin []*handover.Listener // that were given
	for i, l := range given {
		if i == 1 {
			admin = append(admin, l)
		} else {
			pods = append(pods, l)
		}
	}
	var opened []*handover.Listener
	for _, want := range []struct {
		address netip.AddrPort
		among   []*handover.Listener
	}{{netip.AddrPortFrom(netip.Addr{}, t.appPort), pods}, {netip.AddrPortFrom(t.metricsAddress, t.metricsPort), admin}} {
		if at := slices.IndexFunc(want.among, func(l *handover.Listener) bool { return addressOf(l) == want.address }); at >= 0 {
			sockets = append(sockets, want.among[at])
			continue
		}
		l, err := open(ctx, want.address, want.among)
		if err != nil {
			for _, l := range opened {
				l.Close()
			}
			sockets = nil
			return nil, err
		}
		opened, sockets = append(opened, l), append(sockets, l)
	}
	for _, l := range pods {
		if l != sockets[0] && len(sockets) < 2+maxFormer {
			sockets = append(sockets, l)
		}
	}
	for _, former := range t.recorded() {
		if len(sockets) >= 2+maxFormer || slices.ContainsFunc(sockets, func(l *handover.Listener) bool { return portOf(l) == former }) {
			continue
		}
		l, err := handover.Listen(ctx, net.JoinHostPort("", port(former)))
		if err != nil {
			t.log.Warn("pods that are redirected to a former port are not served", "port", former, "error", err)
			continue
		}
		sockets = append(sockets, l)
	}
	for _, l := range sockets[2:] {
		t.log.Info("pods that are still redirected to a former port are served as before", "port", portOf(l))
	}
	return sockets, nil
}

// open listens on an address. The predecessor, which keeps its sockets until it ends, may have the
// port on another address.
func open(ctx context.Context, address netip.AddrPort, had []*handover.Listener) (*handover.Listener, error) {
	host := ""
	if address.Addr().IsValid() {
		host = address.Addr().String()
	}
	where := net.JoinHostPort(host, port(address.Port()))
	if at := slices.IndexFunc(had, func(l *handover.Listener) bool { return portOf(l) == address.Port() }); at >= 0 {
		return handover.ListenBeside(ctx, where, had[at])
	}
	return handover.Listen(ctx, where)
}

// recorded are the ports that pods on record are redirected to, which no predecessor may be there to hand over.
func (t *takeover) recorded() (ports []uint16) {
	records, err := attachment.In(t.stateDir).List()
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.log.Warn("not all records can be read: pods may be redirected to a port that nobody serves", "error", err)
	}
	for _, r := range records {
		for _, one := range r.Redirects {
			if p := one.Proxy.Port(); p != 0 && !slices.Contains(ports, p) {
				ports = append(ports, p)
			}
		}
	}
	return ports
}

// addressOf is the TCP address of a socket, as --metrics-address has it: invalid for every address
// of the node. The port is 0, which is nobody's, where it has none.
func addressOf(l *handover.Listener) netip.AddrPort {
	a, ok := l.Addr().(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	ip := a.AddrPort().Addr().Unmap()
	if ip.IsUnspecified() {
		ip = netip.Addr{}
	}
	return netip.AddrPortFrom(ip, uint16(a.Port))
}

func portOf(l *handover.Listener) uint16 { return addressOf(l).Port() }

// ready waits until the pods of this node are known, and for a while until their credentials are there. It is false where ctx ended before,
// and true at once where the predecessor is gone, or a pod would wait for nobody.
func (t *takeover) ready(ctx context.Context) bool {
	tick := time.NewTicker(again)
	defer tick.Stop()
	var until time.Time
	for {
		select {
		case <-ctx.Done():
			return false
		case now := <-tick.C:
			if t.from.Gone() {
				return true
			}
			if !t.parts.ready() {
				continue
			}
			if until.IsZero() {
				until = now.Add(warm)
			}
			if pending := t.parts.cache.Pending(); pending > 0 && now.Before(until) {
				continue
			} else if pending > 0 {
				t.log.Warn("taking over although STS has not answered for some pods", "pods", pending)
			}
			return true
		}
	}
}

// serve hands over to whoever comes next, until ctx ends. The sockets are accepted on already.
func (t *takeover) serve(ctx context.Context, sockets []*handover.Listener) error {
	if t.from != nil {
		if err := t.from.Serving(); err != nil {
			// It ended in this moment, or serves beside this proxy for as long as it lives.
			t.log.Warn("the proxy that served before", "error", err)
		} else {
			t.log.Info("took over from the proxy that served before")
		}
	}
	t.serves.Store(true)
	server := &handover.Server{
		Path: t.path, Sockets: sockets, State: t.parts.cache.Export, Handed: t.handed.Store, Log: t.log,
	}
	if err := server.Run(ctx); err != nil {
		t.log.Warn("no other proxy can take over: an upgrade closes the port for a moment", "error", err)
		<-ctx.Done()
	}
	return nil
}

// stateLook is how often that is looked for.
const stateLook = 5 * time.Second

// stays waits until ctx ends, or the state directory is removed from under this process.
func (t *takeover) stays(ctx context.Context) error {
	tick := time.NewTicker(stateLook)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if err := checkMounted(t.stateDir); err != nil {
			return err
		}
	}
}

// draining has clients dial anew, the next proxy then, once that has taken over: a connection that is closed while a request is on its
// way would lose it.
func (t *takeover) draining(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if t.handed.Load() {
			w.Header()["Connection"] = []string{"close"}
		}
		h.ServeHTTP(w, r)
	})
}

// drain is how long a proxy whose place another has taken waits for its clients to leave when it is told to end.
const drain = 20 * time.Second

// drained waits, when this proxy is told to end and another has taken over, until no client has a connection with it any more.
func (t *takeover) drained(l *imds.Listener) func() {
	return func() {
		if !t.handed.Load() {
			return
		}
		tick := time.NewTicker(again)
		defer tick.Stop()
		for deadline := time.Now().Add(drain); l.Len() > 0 && time.Now().Before(deadline); {
			<-tick.C
		}
	}
}
