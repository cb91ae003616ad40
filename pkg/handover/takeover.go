package handover

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Socket is a TCP socket to serve. Its name contains all that distinguishes it from another socket: a
// predecessor's socket of the same name takes its place.
type Socket struct {
	Name    string
	Address string // as for net.Listen
}

// Config configures a Takeover.
type Config struct {
	// Path is the path of the unix socket.
	Path string
	// Sockets are the sockets to serve.
	Sockets []Socket
	// Optional returns more sockets to serve. One that cannot be opened is left out. It gets the names
	// of the predecessor's sockets. It may be nil.
	Optional func(inherited []string) []Socket
	// Import adds a predecessor's state and returns the number of its parts. Export returns the state.
	Import func([]byte) (int, error)
	Export func() ([]byte, error)
	// IsReady reports whether this process can serve without its predecessor.
	IsReady func() bool
	// Pending returns the number of parts of the state that are still being obtained.
	Pending func() int
	Log     *slog.Logger
}

// Takeover takes over from a predecessor, serves, and hands over to a successor.
type Takeover struct {
	Config
	portTimeout time.Duration

	predecessor *Predecessor // nil if no process serves
	serving     atomic.Bool
	handedOver  atomic.Bool
}

const (
	// warmTimeout bounds the wait for state that the predecessor does not have: STS may be down.
	warmTimeout = 20 * time.Second
	// minRetry and maxRetry bound the time between two attempts to get a port that another process has.
	minRetry, maxRetry = 50 * time.Millisecond, 2 * time.Second
	// portTimeout bounds these attempts. A proxy that is being stopped takes less time.
	portTimeout = time.Minute
	// drainTimeout bounds the wait for clients to close their connections to a replaced process.
	drainTimeout = 20 * time.Second
)

// New returns a Takeover.
func New(c Config) *Takeover { return &Takeover{Config: c, portTimeout: portTimeout} }

// Begin connects to the predecessor, if there is one, and imports its state.
func (t *Takeover) Begin(ctx context.Context) {
	var err error
	if t.predecessor, err = Dial(ctx, t.Path); err != nil {
		t.Log.Warn("cannot take over from the proxy that serves", "error", err)
	}
	if t.predecessor != nil {
		t.Log.Info("another proxy serves; taking over when the pods and their credentials are known", "credentials", t.importState())
	}
}

// importState imports the predecessor's state and returns the number of its parts. Without it, this
// process starts cold.
func (t *Takeover) importState() int {
	state, err := t.predecessor.State()
	n := 0
	if err == nil {
		n, err = t.Import(state)
	}
	if err != nil {
		t.Log.Warn("starting without the credentials of the proxy that serves", "error", err)
	}
	return n
}

// Close closes the connection to the predecessor, which accepts again if it still runs.
func (t *Takeover) Close() {
	if t.predecessor != nil {
		t.predecessor.Close()
		t.predecessor = nil
	}
}

// IsServing reports whether this process has its sockets, or had them until a successor took over.
func (t *Takeover) IsServing() bool { return t.serving.Load() }

// IsHandedOver reports whether a successor has taken over.
func (t *Takeover) IsHandedOver() bool { return t.handedOver.Load() }

// Listen waits until this process can serve, and returns its sockets by name. It takes them from the
// predecessor, and opens the others. It returns nil and no error if ctx ends first.
func (t *Takeover) Listen(ctx context.Context) (map[string]*Listener, error) {
	var since time.Time // of the first attempt that failed
	for retry := minRetry; ; retry = min(2*retry, maxRetry) {
		if t.predecessor != nil {
			if !t.waitUntilReady(ctx) {
				return nil, nil
			}
			// The first state may have expired, and the predecessor may have renewed some credentials.
			t.importState()
			inherited, err := t.predecessor.Sockets()
			if err == nil {
				var sockets map[string]*Listener
				if sockets, err = t.open(ctx, inherited); err == nil {
					return sockets, nil
				}
			}
			t.Log.Warn("the proxy that serves did not hand over", "error", err)
			t.Close()
		}
		sockets, err := t.open(ctx, nil)
		switch {
		case err == nil:
			return sockets, nil
		case !errors.Is(err, unix.EADDRINUSE):
			return nil, err
		case since.IsZero():
			t.Log.Warn("another process has a port; waiting for it", "error", err)
			since = time.Now()
		case time.Since(since) > t.portTimeout:
			return nil, fmt.Errorf("another process has a port and does not hand it over through %s: "+
				"does it run with another --state-dir? %w", t.Path, err)
		}
		select {
		case <-ctx.Done():
			return nil, nil
		case <-time.After(retry):
		}
		if t.predecessor, err = Dial(ctx, t.Path); err != nil {
			t.Log.Debug("cannot take over from the proxy that serves", "error", err)
		}
	}
}

// open returns the sockets to serve: the inherited ones, and new ones. It closes the inherited sockets
// that it does not return.
func (t *Takeover) open(ctx context.Context, inherited map[string]*Listener) (_ map[string]*Listener, err error) {
	sockets := make(map[string]*Listener)
	defer func() {
		if err != nil {
			closeAll(sockets)
		}
		for name, l := range inherited {
			if sockets[name] != l || err != nil {
				l.Close()
			}
		}
	}()
	for _, s := range t.Sockets {
		if sockets[s.Name], err = openOne(ctx, s, inherited); err != nil {
			delete(sockets, s.Name)
			return nil, err
		}
	}
	if t.Optional == nil {
		return sockets, nil
	}
	names := make([]string, 0, len(inherited))
	for name := range inherited {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, s := range t.Optional(names) {
		l, err := openOne(ctx, s, inherited)
		if err != nil {
			t.Log.Warn("a socket cannot be opened", "socket", s.Name, "error", err)
			continue
		}
		sockets[s.Name] = l
	}
	return sockets, nil
}

// openOne returns the inherited socket of the same name, or a new one. The predecessor keeps its
// sockets open and may have the port on another address.
func openOne(ctx context.Context, s Socket, inherited map[string]*Listener) (*Listener, error) {
	if l := inherited[s.Name]; l != nil {
		return l, nil
	}
	address, err := net.ResolveTCPAddr("tcp", s.Address)
	if err != nil {
		return nil, err
	}
	for _, l := range inherited {
		if int(l.Port()) == address.Port && hostOf(l.Addr()) != hostOf(address) {
			return listenBeside(ctx, s.Address, l)
		}
	}
	return Listen(ctx, s.Address)
}

// hostOf returns the IP of a TCP address, and the zero Addr for the unspecified address.
func hostOf(a net.Addr) netip.Addr {
	ip := a.(*net.TCPAddr).AddrPort().Addr().Unmap()
	if ip.IsUnspecified() {
		return netip.Addr{}
	}
	return ip
}

// waitUntilReady waits until this process can serve, and up to warmTimeout until no state is pending.
// It returns at once if the predecessor has ended: clients wait then. It returns false if ctx ends.
func (t *Takeover) waitUntilReady(ctx context.Context) bool {
	tick := time.NewTicker(minRetry)
	defer tick.Stop()
	var deadline time.Time
	for {
		var now time.Time
		select {
		case <-ctx.Done():
			return false
		case now = <-tick.C:
		}
		if t.predecessor.HasEnded() {
			return true
		}
		if !t.IsReady() {
			continue
		}
		if deadline.IsZero() {
			deadline = now.Add(warmTimeout)
		}
		pending := t.Pending()
		if pending == 0 {
			return true
		}
		if !now.Before(deadline) {
			t.Log.Warn("taking over although STS has not answered for some pods", "pods", pending)
			return true
		}
	}
}

// Serve completes the takeover and hands over to successors until ctx ends. The caller accepts on the
// sockets already.
func (t *Takeover) Serve(ctx context.Context, sockets map[string]*Listener) error {
	if t.predecessor != nil {
		if err := t.predecessor.Commit(); err != nil {
			// It has just ended, or accepts as well until it ends.
			t.Log.Warn("the proxy that served did not confirm the takeover", "error", err)
		} else {
			t.Log.Info("took over from the proxy that served before")
		}
	}
	t.serving.Store(true)
	server := &Server{Path: t.Path, Sockets: sockets, State: t.Export, OnChange: t.handedOver.Store, Log: t.Log}
	return server.Run(ctx)
}

// CloseConnections makes clients dial again, and so reach the successor, once this process is replaced.
// The server closes a connection with its answer: closing an idle one could lose a request in transit.
func (t *Takeover) CloseConnections(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if t.handedOver.Load() {
			w.Header()["Connection"] = []string{"close"}
		}
		h.ServeHTTP(w, r)
	})
}

// Drain waits up to drainTimeout until a process that is replaced has no open connection. It returns
// at once if no successor has taken over.
func (t *Takeover) Drain(open func() int) {
	if !t.handedOver.Load() {
		return
	}
	tick := time.NewTicker(minRetry)
	defer tick.Stop()
	for deadline := time.Now().Add(drainTimeout); open() > 0 && time.Now().Before(deadline); {
		<-tick.C
	}
}
