package dedup

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// newTestLog returns a deduplicating handler, its logger, and a function that returns and removes the
// lines that were logged.
func newTestLog(period time.Duration) (*Handler, *slog.Logger, func() []string) {
	var buffer bytes.Buffer
	h := New(slog.NewTextHandler(&buffer, &slog.HandlerOptions{ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
		if len(groups) == 0 && (a.Key == slog.TimeKey || a.Key == slog.LevelKey) {
			return slog.Attr{}
		}
		return a
	}}), period)
	return h, slog.New(h), func() []string {
		lines := strings.Split(strings.TrimSpace(buffer.String()), "\n")
		buffer.Reset()
		return lines
	}
}

func TestPersistentWarningIsLoggedOnce(t *testing.T) {
	h, log, lines := newTestLog(0)
	for range 3 {
		log.Warn("not guarded", "link", "eth0")
		log.Warn("not guarded", "link", "eth0")
		h.NextRound()
	}
	if d := cmp.Diff([]string{`msg="not guarded" link=eth0`}, lines()); d != "" {
		t.Error(d)
	}
	h.NextRound()
	log.Warn("not guarded", "link", "eth0")
	if d := cmp.Diff([]string{`msg="not guarded" link=eth0`}, lines()); d != "" {
		t.Errorf("after a round without the warning: %s", d)
	}
}

func TestDifferentRecordsAreLogged(t *testing.T) {
	_, log, lines := newTestLog(0)
	for range 2 {
		log.Warn("a", "error", errors.New("x"))
		log.Warn("a", "error", errors.New("y"))
		log.Warn("a", "error", "x y=z")
		log.Warn("a", "error", "x", "y", "z")
		log.With("pod", "p").Warn("a", "error", "x", "y", "z")
		log.WithGroup("g").Warn("a", "error", "x", "y", "z")
		log.Error("b")
		log.Info("not a warning")
	}
	want := []string{
		`msg=a error=x`, `msg=a error=y`, `msg=a error="x y=z"`, `msg=a error=x y=z`, `msg=a pod=p error=x y=z`,
		`msg=a g.error=x g.y=z`, `msg=b`, `msg="not a warning"`, `msg="not a warning"`,
	}
	if d := cmp.Diff(want, lines()); d != "" {
		t.Error(d)
	}
}

func TestPeriodEndsRound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, log, lines := newTestLog(time.Minute)
		for _, step := range []struct {
			pause  time.Duration
			logged bool
		}{
			{0, true},
			{30 * time.Second, false},
			{time.Minute, false},
			{90 * time.Second, false},
			{2 * time.Minute, true},
			{59 * time.Second, false},
			{time.Hour, true},
		} {
			time.Sleep(step.pause)
			log.Warn("w")
			if logged := lines()[0] != ""; logged != step.logged {
				t.Errorf("%v after the last one: logged is %v", step.pause, logged)
			}
		}
	})
}

func TestMemoryIsBounded(t *testing.T) {
	h, log, _ := newTestLog(0)
	for i := range 5 * maxRecords {
		log.Warn(fmt.Sprint(i))
	}
	if n := len(h.seen.previous) + len(h.seen.current); n > 2*maxRecords {
		t.Errorf("%d records are remembered", n)
	}
}
