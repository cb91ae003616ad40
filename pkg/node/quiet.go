package node

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
)

// quiet passes on what is said, but for warnings that were said in the round before: what is wrong and stays so is said once.
type quiet struct {
	slog.Handler
	*heard
}

// heard is what was warned of in this round and the one before, by its words.
type heard struct {
	mu           sync.Mutex
	before, here map[string]bool
}

func newQuiet(h slog.Handler) *quiet {
	return &quiet{h, &heard{before: make(map[string]bool), here: make(map[string]bool)}}
}

// begin begins a round.
func (h *heard) begin() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.before, h.here = h.here, make(map[string]bool)
}

// Handle implements slog.Handler.
func (q *quiet) Handle(ctx context.Context, r slog.Record) error {
	if r.Level >= slog.LevelWarn {
		words := r.Message
		r.Attrs(func(a slog.Attr) bool {
			words += fmt.Sprint(" ", a)
			return true
		})
		q.mu.Lock()
		known := q.before[words] || q.here[words]
		q.here[words] = true
		q.mu.Unlock()
		if known {
			return nil
		}
	}
	return q.Handler.Handle(ctx, r)
}

// WithAttrs implements slog.Handler.
func (q *quiet) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &quiet{q.Handler.WithAttrs(attrs), q.heard}
}

// WithGroup implements slog.Handler.
func (q *quiet) WithGroup(name string) slog.Handler {
	return &quiet{q.Handler.WithGroup(name), q.heard}
}
