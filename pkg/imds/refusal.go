package imds

import (
	"log/slog"
	"net/netip"
	"sync"
	"time"
)

// refusalLog writes a line for a refusal, but of the same refusal to the same address only one in a while: an SDK that is
// refused asks again and again.
type refusalLog struct {
	logger *slog.Logger

	mu   sync.Mutex
	last map[netip.Addr]loggedRefusal
}

type loggedRefusal struct {
	reason  string
	at      time.Time
	dropped int
}

const (
	// refusalPause is how long the same refusal is not logged again.
	refusalPause = 30 * time.Second
	// maxRefusals bounds the addresses that are remembered.
	maxRefusals = 1024
)

func newRefusalLog(l *slog.Logger) *refusalLog {
	return &refusalLog{logger: l, last: make(map[netip.Addr]loggedRefusal)}
}

func (l *refusalLog) log(source netip.Addr, subject string, status int, reason error) {
	now, text := time.Now(), reason.Error()
	l.mu.Lock()
	last, ok := l.last[source]
	if ok && last.reason == text && now.Sub(last.at) < refusalPause {
		last.dropped++
		l.last[source] = last
		l.mu.Unlock()
		return
	}
	if len(l.last) >= maxRefusals {
		clear(l.last)
	}
	l.last[source] = loggedRefusal{reason: text, at: now}
	l.mu.Unlock()
	l.logger.Warn("pod refused", "pod", subject, "source", source, "status", status, "reason", text, "unlogged", last.dropped)
}
