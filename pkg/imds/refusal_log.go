package imds

import (
	"log/slog"
	"net/netip"
	"sync"
	"time"
)

// refusalLog logs refusals. For each source address it logs the same reason once in refusalInterval,
// and at most maxReasons reasons, because SDKs retry and a hostile pod may try to fill the log.
type refusalLog struct {
	logger *slog.Logger

	mu      sync.Mutex
	sources map[netip.Addr]*loggedRefusals
}

// loggedRefusals are the refusals of one source address since a time.
type loggedRefusals struct {
	since    time.Time
	logged   map[string]bool // by reason
	unlogged int
}

const (
	refusalInterval = 30 * time.Second
	maxReasons      = 4
	// maxRefusalSources limits the memory of the log.
	maxRefusalSources = 1024
)

func newRefusalLog(l *slog.Logger) *refusalLog {
	return &refusalLog{logger: l, sources: make(map[netip.Addr]*loggedRefusals)}
}

// log logs a refusal. The attributes in more do not make it a different reason.
func (l *refusalLog) log(source netip.Addr, subject string, status int, reason error, more ...any) {
	text := reason.Error()
	if unlogged, ok := l.admit(source, text, time.Now()); ok {
		l.logger.Warn("pod refused", append([]any{"pod", subject, "source", source, "status", status, "reason", text, "unlogged", unlogged}, more...)...)
	}
}

// admit reports whether to log a refusal, and how many refusals of the previous interval were not logged.
func (l *refusalLog) admit(source netip.Addr, reason string, now time.Time) (unlogged int, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	r := l.sources[source]
	if r == nil || now.Sub(r.since) >= refusalInterval {
		if r != nil {
			unlogged = r.unlogged
		}
		if len(l.sources) >= maxRefusalSources {
			clear(l.sources)
		}
		r = &loggedRefusals{since: now, logged: make(map[string]bool)}
		l.sources[source] = r
	}
	if r.logged[reason] || len(r.logged) >= maxReasons {
		r.unlogged++
		return 0, false
	}
	r.logged[reason] = true
	return unlogged, true
}
