// Package dedup provides a slog.Handler that drops repeated warnings.
package dedup

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"
)

// Handler passes records to another handler, except a warning or an error that an earlier record of
// this round or of the previous one equals in message and attributes. A condition that persists is
// therefore logged once, and again if it returns after more than a round.
//
// A round ends when NextRound is called, or by itself after a period. Handlers that WithAttrs and
// WithGroup derive share their memory.
type Handler struct {
	next   slog.Handler
	prefix string // the attributes and groups of WithAttrs and WithGroup
	seen   *seen
}

// maxRecords bounds the records that are remembered of one round. The next one begins a new round.
const maxRecords = 1024

// seen is the memory of two rounds.
type seen struct {
	period time.Duration

	mu                sync.Mutex
	began             time.Time // when the period began, by the records' time
	previous, current map[string]bool
}

// New returns a handler that passes records to next. A round ends after period, measured by the time
// of the records. Zero means that only NextRound ends a round.
func New(next slog.Handler, period time.Duration) *Handler {
	return &Handler{next: next, seen: &seen{period: period, current: make(map[string]bool)}}
}

// NextRound ends the current round.
func (h *Handler) NextRound() {
	h.seen.mu.Lock()
	defer h.seen.mu.Unlock()
	h.seen.nextRound()
}

// Enabled implements slog.Handler.
func (h *Handler) Enabled(ctx context.Context, l slog.Level) bool { return h.next.Enabled(ctx, l) }

// Handle implements slog.Handler.
func (h *Handler) Handle(ctx context.Context, r slog.Record) error {
	if r.Level >= slog.LevelWarn {
		key := fmt.Sprintf("%s%q", h.prefix, r.Message)
		r.Attrs(func(a slog.Attr) bool {
			key += fmt.Sprintf("%q", a.String())
			return true
		})
		if h.seen.isRepeated(key, r.Time) {
			return nil
		}
	}
	return h.next.Handle(ctx, r)
}

// WithAttrs implements slog.Handler.
func (h *Handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &Handler{h.next.WithAttrs(attrs), fmt.Sprintf("%s%q", h.prefix, fmt.Sprint(attrs)), h.seen}
}

// WithGroup implements slog.Handler.
func (h *Handler) WithGroup(name string) slog.Handler {
	return &Handler{h.next.WithGroup(name), fmt.Sprintf("%s%q", h.prefix, name), h.seen}
}

// isRepeated remembers the key and reports whether it was remembered before.
func (s *seen) isRepeated(key string, now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if elapsed := now.Sub(s.began); s.period > 0 && elapsed >= s.period {
		if elapsed >= 2*s.period {
			clear(s.current) // the period before this one had no record
		}
		s.nextRound()
		s.began = now
	}
	repeated := s.previous[key] || s.current[key]
	if len(s.current) >= maxRecords {
		s.nextRound()
	}
	s.current[key] = true
	return repeated
}

// nextRound ends the current round. The mutex is held.
func (s *seen) nextRound() { s.previous, s.current = s.current, make(map[string]bool) }
