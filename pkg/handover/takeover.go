package handover

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Config configures a Takeover.
type Config struct {
	// Path is the path of the unix socket, in a directory that only this process's user can write.
	Path string
	// Sockets are the sockets to serve.
	Sockets []Socket
	// Optional returns further sockets to serve, given the names of the predecessor's sockets. A pod's
	// rules redirect to the port that the proxy had at the pod's ADD, also after the proxy's port has
	// changed. A socket that cannot be opened is left out.
	Optional func(inherited []string) []Socket
	// Import adds a predecessor's state and returns the number of entries that it added. Export
	// returns this process's state.
	Import func([]byte) (int, error)
	Export func() ([]byte, error)
	// IsReady reports whether this process can serve without its predecessor.
	IsReady func() bool
	// Pending returns the number of entries of the state that this process has not obtained yet.
	Pending func() int
	Log     *slog.Logger
}

// Takeover takes over from a predecessor, serves, and hands over to a successor.
type Takeover struct {
	Config
	checkInterval, portTimeout time.Duration // the constants, except in tests
	stateVersion               int

	predecessor *Predecessor // nil if no process serves
	serving     atomic.Bool

	mu         sync.Mutex // held while the sockets are paused and resumed
	successors int        // the number of connected processes that have taken over
}

const (
	// pollInterval is the time between two checks of a condition.
	pollInterval = 50 * time.Millisecond
	// portInterval is the time between two attempts to listen on a port that another process uses.
	// portTimeout bounds these attempts. A proxy that is being stopped releases its port earlier.
	portInterval, portTimeout = 200 * time.Millisecond, time.Minute
	// warmTimeout bounds the wait for credentials that the predecessor does not have: STS may be
	// down.
	warmTimeout = 20 * time.Second
	// drainTimeout bounds the wait for clients to close their connections to a replaced process.
	drainTimeout = 20 * time.Second
	// checkInterval is the time between two checks of the unix socket.
	checkInterval = 10 * time.Second
)

// New returns a Takeover.
func New(c Config) *Takeover {
	return &Takeover{Config: c, checkInterval: checkInterval, portTimeout: portTimeout, stateVersion: stateVersion}
}

// Begin connects to the predecessor, if there is one, and imports its state.
func (t *Takeover) Begin(ctx context.Context) {
	if n := t.connect(ctx); t.predecessor != nil {
		t.Log.Info("another proxy serves; taking over when the pods and their credentials are known", "credentials", n)
	}
}

// connect connects to the process that serves at the path, in place of the connection that t has.
// It imports that process's state and returns the number of imported entries. If no process serves,
// it changes nothing. If the state cannot be imported, this process starts cold.
func (t *Takeover) connect(ctx context.Context) (imported int) {
	p, err := Dial(ctx, t.Path)
	if err != nil {
		t.Log.Warn("cannot take over from the proxy that serves", "error", err)
	}
	if p == nil {
		return 0
	}
	t.Close()
	t.predecessor = p
	state, err := p.State()
	if err == nil {
		imported, err = t.Import(state)
	}
	if err != nil {
		t.Log.Warn("starting without the credentials of the proxy that serves", "error", err)
	}
	return imported
}

// Close closes the connection to the predecessor, which accepts again if it still runs.
func (t *Takeover) Close() {
	if t.predecessor != nil {
		t.predecessor.Close()
		t.predecessor = nil
	}
}

// IsServing reports whether this process has begun to serve. It remains true after a successor has
// taken over.
func (t *Takeover) IsServing() bool { return t.serving.Load() }

// Listen waits until this process can serve, and returns its sockets by name. It takes over the
// sockets that the predecessor has and opens the rest. It returns nil and no error if ctx ends
// first.
func (t *Takeover) Listen(ctx context.Context) (map[string]*Listener, error) {
	var deadline time.Time
	for {
		if t.predecessor == nil {
			t.connect(ctx)
		}
		if t.predecessor != nil {
			if !t.waitUntilReady(ctx) {
				return nil, nil
			}
			// Imports the state again: credentials of the first state may have expired, and the
			// predecessor may have renewed some.
			t.connect(ctx)
		}
		sockets, err := t.open(ctx)
		switch {
		case !errors.Is(err, unix.EADDRINUSE):
			return sockets, err
		case deadline.IsZero():
			t.Log.Warn("another process has a port; waiting for it", "error", err)
			deadline = time.Now().Add(t.portTimeout)
		case time.Now().After(deadline):
			return nil, fmt.Errorf("another process has a port and does not hand it over through %s: "+
				"does it run with another --state-dir? %w", t.Path, err)
		}
		// The next attempt connects again: the predecessor may have ended, or another process may
		// have replaced it.
		t.Close()
		select {
		case <-ctx.Done():
			return nil, nil
		case <-time.After(portInterval):
		}
	}
}

// open returns the sockets to serve. It takes each from the predecessor or opens it, and closes the
// predecessor's other sockets.
func (t *Takeover) open(ctx context.Context) (map[string]*Listener, error) {
	var inherited map[string]*Listener
	if t.predecessor != nil {
		inherited, t.predecessor.Sockets = t.predecessor.Sockets, nil
	}
	sockets := make(map[string]*Listener)
	optional := t.Optional(slices.Sorted(maps.Keys(inherited)))
	for i, s := range slices.Concat(t.Sockets, optional) {
		l, err := inherited[s.Name], error(nil)
		if l == nil {
			l, err = s.Listen(ctx, t.predecessor != nil)
		}
		switch {
		case err == nil:
			sockets[s.Name] = l
		case i < len(t.Sockets):
			closeAll(sockets)
			closeAll(inherited)
			return nil, err
		default:
			t.Log.Warn("a socket cannot be opened", "socket", s.Name, "error", err)
		}
	}
	maps.DeleteFunc(inherited, func(name string, l *Listener) bool { return sockets[name] == l })
	closeAll(inherited)
	return sockets, nil
}

// waitUntilReady waits until this process can serve, and then up to warmTimeout until no state is
// pending. If the predecessor ends, it stops waiting, because no process answers the clients. It
// returns false if ctx ends.
func (t *Takeover) waitUntilReady(ctx context.Context) bool {
	var deadline time.Time
	for ctx.Err() == nil && !t.predecessor.HasEndedWithin(pollInterval) {
		if !t.IsReady() {
			continue
		}
		pending := t.Pending()
		if pending == 0 {
			break
		}
		if now := time.Now(); deadline.IsZero() {
			deadline = now.Add(warmTimeout)
		} else if now.After(deadline) {
			t.Log.Warn("taking over although STS has not answered for some pods", "pods", pending)
			break
		}
	}
	return ctx.Err() == nil
}

// Serve completes the takeover and hands over to successors until ctx ends. The caller must already
// accept on the sockets.
func (t *Takeover) Serve(ctx context.Context, sockets map[string]*Listener) error {
	if t.predecessor != nil {
		if err := t.predecessor.Commit(); err != nil {
			// Either it has just ended, or both processes accept until it ends.
			t.Log.Warn("the proxy that served did not confirm the takeover", "error", err)
		} else {
			t.Log.Info("took over from the proxy that served before")
		}
	}
	t.serving.Store(true)
	return t.acceptSuccessors(ctx, sockets)
}

// CloseConnections wraps h. Once a successor has taken over, each answer closes its connection, so
// the client dials again and reaches the successor. Idle connections stay open, because closing one
// could lose a request in transit.
func (t *Takeover) CloseConnections(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if t.isHandedOver() {
			w.Header()["Connection"] = []string{"close"}
		}
		h.ServeHTTP(w, r)
	})
}

// Drain waits up to drainTimeout until this process has no open connection. It does not wait
// if no successor has taken over. open returns the number of open connections.
func (t *Takeover) Drain(open func() int) {
	for end := time.Now().Add(drainTimeout); t.isHandedOver() && open() > 0 && time.Now().Before(end); {
		time.Sleep(pollInterval)
	}
}
