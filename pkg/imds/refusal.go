package imds

import (
	"log/slog"
	"net/netip"
	"sync"
	"time"
)

// refusalLog writes a line for a refusal, but of the same refusal to the same address only one in a while, and of all
// refusals to one address only a few: an SDK that is refused asks again and again, and a pod may mean to fill the log.
type refusalLog struct {
	logger *slog.Logger

	mu      sync.Mutex
	sources map[netip.Addr]*refusals
}

// refusals is what was logged for one address since a moment.
type refusals struct {
	since    time.Time
	logged   map[string]bool // by reason
	unlogged int
}

const (
	// refusalPause is how long the same refusal is not logged again.
	refusalPause = 30 * time.Second
	// maxReasons is how many different refusals to one address are logged in that time.
	maxReasons = 4
	// maxRefusals bounds the addresses that are remembered.
	maxRefusals = 1024
)

func newRefusalLog(l *slog.Logger) *refusalLog {
	return &refusalLog{logger: l, sources: make(map[netip.Addr]*refusals)}
}

// log writes the line, with more about this very refusal that does not make it another one.
func (l *refusalLog) log(source netip.Addr, subject string, status int, reason error, more ...any) {
	text := reason.Error()
	if unlogged, ok := l.admit(source, text, time.Now()); ok {
		l.logger.Warn("pod refused", append([]any{"pod", subject, "source", source, "status", status, "reason", text, "unlogged", unlogged}, more...)...)
	}
}

// admit tells whether a refusal is to be logged, and how many were not since the last pause began.
func (l *refusalLog) admit(source netip.Addr, reason string, now time.Time) (unlogged int, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	r := l.sources[source]
	if r == nil || now.Sub(r.since) >= refusalPause {
		if r != nil {
			unlogged = r.unlogged
		}
		if len(l.sources) >= maxRefusals {
			clear(l.sources)
		}
		r = &refusals{since: now, logged: make(map[string]bool)}
		l.sources[source] = r
	}
	if r.logged[reason] || len(r.logged) >= maxReasons {
		r.unlogged++
		return 0, false
	}
	r.logged[reason] = true
	return unlogged, true
}
