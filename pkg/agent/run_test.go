package agent

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// TestRun compares the times of rounds. Time is that of a synctest bubble, in which a round takes
// none.
func TestRun(t *testing.T) {
	const s = time.Second
	for name, tc := range map[string]struct {
		changes []time.Duration // when rules are changed
		want    []time.Duration // when rounds are made
	}{
		"nothing changes":          {nil, []time.Duration{0, 10 * s, 20 * s, 30 * s}},
		"a change":                 {[]time.Duration{3 * s}, []time.Duration{0, 3*s + settleTime, 13*s + settleTime, 23*s + settleTime, 33*s + settleTime}},
		"changes in a row are one": {[]time.Duration{3 * s, 3*s + settleTime/4, 3*s + settleTime/2}, []time.Duration{0, 3*s + settleTime, 13*s + settleTime, 23*s + settleTime, 33*s + settleTime}},
		// A round that found nothing is followed by a rest.
		"a change after the row":         {[]time.Duration{3 * s, 3*s + 2*settleTime}, []time.Duration{0, 3*s + settleTime, 4*s + settleTime, 14*s + settleTime, 24*s + settleTime, 34*s + settleTime}},
		"a change as the interval ends":  {[]time.Duration{10*s - 1}, []time.Duration{0, 10*s - 1 + settleTime, 20*s - 1 + settleTime, 30*s - 1 + settleTime}},
		"a change as the agent is ended": {[]time.Duration{35*s - settleTime/2}, []time.Duration{0, 10 * s, 20 * s, 30 * s}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBed(t, "nftables")
				b.round() // makes the guard, and looks twice for that
				start := time.Now()
				var rounds []time.Duration
				b.BypassCandidates = func(map[int]string) (map[int]bool, error) {
					rounds = append(rounds, time.Since(start))
					return nil, nil
				}
				for _, at := range tc.changes {
					time.AfterFunc(at, b.Trigger)
				}
				ctx, cancel := context.WithTimeout(t.Context(), 35*s)
				defer cancel()
				if err := b.Agent.Run(ctx); err != nil {
					t.Errorf("got %v", err)
				}
				if diff := cmp.Diff(tc.want, rounds); diff != "" {
					t.Error(diff)
				}
				if time.Since(start) != 35*s {
					t.Errorf("ended after %v", time.Since(start))
				}
			})
		})
	}
}

// TestRunGoesOn after a round that fails, and leaves everything as it is at its end.
func TestRunGoesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t, "nftables")
		failures := 2
		b.Links = func() (map[int]string, error) {
			if failures--; failures >= 0 {
				return nil, errors.New("injected failure")
			}
			return b.links, nil
		}
		b.Interval = time.Second
		var ready []string
		failed := 0
		b.OnRepaired = func(err error) {
			if err != nil {
				failed++
			} else {
				ready = append(ready, b.AllRules())
			}
		}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		if err := b.Agent.Run(ctx); err != nil {
			t.Errorf("got %v", err)
		}
		if rules := b.AllRules(); rules == "" {
			t.Error("the node is not guarded")
		}
		if failed == 0 {
			t.Error("no failed round is logged")
		}
		if len(ready) < 5 {
			t.Errorf("ready %d times in ten rounds", len(ready))
		}
		for _, rules := range ready {
			if !strings.Contains(rules, `ip addresses: 169.254.169.254`) {
				t.Errorf("ready with %s", rules)
			}
		}
		b.wantCut("at the end")
	})
}
