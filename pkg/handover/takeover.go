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
	// Optional returns more sockets to serve: a pod keeps the port of its ADD after the proxy's has
	// changed. One that cannot be opened is left out. It gets the names of the predecessor's sockets.
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
	checkInterval, portTimeout time.Duration // the constants, except in tests
	stateVersion               int

	predecessor *Predecessor // nil if no process serves
	serving     atomic.Bool

	mu         sync.Mutex // held while the sockets are paused and resumed
	successors int        // the number of connections of processes that have taken over
}

const (
	// pollInterval is the time between two looks at a condition.
	pollInterval = 50 * time.Millisecond
	// portInterval is the time between two attempts to get a port that another process has, and
	// portTimeout bounds them. A proxy that is being stopped takes less time.
	portInterval, portTimeout = 200 * time.Millisecond, time.Minute
	// warmTimeout bounds the wait for state that the predecessor does not have: STS may be down.
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

// connect replaces the connection to the predecessor if there is one at the path, imports its
// state, and returns the number of its parts. Without the state, this process starts cold.
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

// IsServing reports whether this process has its sockets, or had them until a successor took over.
func (t *Takeover) IsServing() bool { return t.serving.Load() }

// Listen waits until this process can serve, and returns its sockets by name. It takes them from
// the predecessor, and opens the others. It returns nil and no error if ctx ends first.
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
			// The first state may have expired, and the predecessor may have renewed some credentials.
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
		t.Close() // it may end, or another process may have its place
		select {
		case <-ctx.Done():
			return nil, nil
		case <-time.After(portInterval):
		}
	}
}

// open returns the sockets to serve: the predecessor's, and new ones. It closes the predecessor's
// sockets that it does not return.
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
			l, err = s.Listen(ctx)
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

// waitUntilReady waits until this process can serve, and up to warmTimeout until no state is
// pending. It does not wait longer if the predecessor has ended, because clients wait then. It
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

// Serve completes the takeover and hands over to successors until ctx ends. The caller accepts on
// the sockets already.
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
	return t.acceptSuccessors(ctx, sockets)
}

// CloseConnections makes clients dial again, and so reach the successor, once this process is
// replaced. The server closes a connection with its answer: closing an idle one could lose a
// request in transit.
func (t *Takeover) CloseConnections(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if t.isHandedOver() {
			w.Header()["Connection"] = []string{"close"}
		}
		h.ServeHTTP(w, r)
	})
}

// Drain waits up to drainTimeout until a process that is replaced has no open connection. It
// returns at once if no successor has taken over.
func (t *Takeover) Drain(open func() int) {
	for end := time.Now().Add(drainTimeout); t.isHandedOver() && open() > 0 && time.Now().Before(end); {
		time.Sleep(pollInterval)
	}
}
