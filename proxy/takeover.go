package main

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/handover"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/imds"
)

// takeover is how this proxy comes by its ports, from the proxy that serves this node now if there is one, and how the next one gets them.
type takeover struct {
	*options
	parts *parts
	log   *slog.Logger
	path  string

	from   *handover.Predecessor // nil where nobody served
	handed atomic.Bool           // whether another proxy has taken over
}

// handoverSocket is the unix socket, by the state directory.
func handoverSocket(stateDir string) string { return filepath.Join(stateDir, "handover.sock") }

func newTakeover(o *options, p *parts, log *slog.Logger) *takeover {
	return &takeover{options: o, parts: p, log: log, path: handoverSocket(o.stateDir)}
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
	// again is how soon a port is tried again that somebody else holds.
	again = 50 * time.Millisecond
)

// sockets are those that pods are served on and that of the admin port: this process's own, or the predecessor's once this proxy knows what it
// has to. They are nil where ctx ended before.
func (t *takeover) sockets(ctx context.Context) ([]*handover.Listener, error) {
	said := false
	for {
		if t.from != nil {
			if !t.ready(ctx) {
				return nil, nil
			}
			// Once more: what nobody held was forgotten if the pods were long in coming, and the predecessor has renewed some since.
			t.credentials()
			sockets, err := t.from.Sockets()
			if err == nil && len(sockets) != 2 {
				err = errors.New("it has other sockets")
			}
			if err == nil && t.same(sockets) {
				return sockets, nil
			}
			for _, l := range sockets {
				l.Close()
			}
			if err != nil {
				t.log.Warn("the proxy that serves did not hand over", "error", err)
			}
			t.from.Close()
			t.from = nil
		}
		sockets, err := t.listen(ctx)
		if err == nil {
			return sockets, nil
		}
		if !errors.Is(err, unix.EADDRINUSE) {
			return nil, err
		}
		if !said {
			t.log.Warn("another process has the port; waiting for it", "error", err)
			said = true
		}
		select {
		case <-ctx.Done():
			return nil, nil
		case <-time.After(again):
		}
		if t.from, err = handover.Find(ctx, t.path); err != nil {
			t.from = nil
		}
	}
}

func (t *takeover) addresses() []string {
	return []string{net.JoinHostPort("", port(t.appPort)), net.JoinHostPort("", port(t.metricsPort))}
}

// listen opens this process's own sockets, both or none.
func (t *takeover) listen(ctx context.Context) ([]*handover.Listener, error) {
	var sockets []*handover.Listener
	for _, address := range t.addresses() {
		l, err := handover.Listen(ctx, address)
		if err != nil {
			for _, l := range sockets {
				l.Close()
			}
			return nil, err
		}
		sockets = append(sockets, l)
	}
	return sockets, nil
}

// same tells whether the sockets are on the ports that this proxy is to serve: with others given it opens its own.
func (t *takeover) same(sockets []*handover.Listener) bool {
	for i, p := range []uint16{t.appPort, t.metricsPort} {
		if a, ok := sockets[i].Addr().(*net.TCPAddr); !ok || a.Port != int(p) {
			return false
		}
	}
	return true
}

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
	server := &handover.Server{
		Path: t.path, Sockets: sockets, State: t.parts.cache.Export, Handed: t.handed.Store, Log: t.log,
	}
	if err := server.Run(ctx); err != nil {
		t.log.Warn("no other proxy can take over: an upgrade closes the port for a moment", "error", err)
		<-ctx.Done()
	}
	return nil
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
