package credentials

import (
	"testing"
	"time"
)

// drawn is the least and the most of many draws.
func drawn(draw func() time.Duration) (least, most time.Duration) {
	least = draw()
	for range 2000 {
		d := draw()
		least, most = min(least, d), max(most, d)
	}
	return least, most
}

// TestRangesOfDelays is what chance makes of each delay: all of its span, and no more.
func TestRangesOfDelays(t *testing.T) {
	var s Schedule
	end := epoch.Add(time.Hour)
	remaining := func(lifetime, left time.Duration) func() time.Duration {
		return func() time.Duration { return end.Sub(s.Renewal(end, lifetime, left)) }
	}
	for name, tt := range map[string]struct {
		draw        func() time.Duration
		least, most time.Duration
	}{
		"a renewal":                   {remaining(time.Hour, 1800*time.Second), 1800 * time.Second, 2100 * time.Second},
		"one that was almost late":    {remaining(time.Hour, minRemaining), 1800 * time.Second, 2100 * time.Second},
		"the first one":               {remaining(time.Hour, -1), 1800 * time.Second, 59 * time.Minute},
		"one that came too late":      {remaining(time.Hour, minRemaining-1), 1800 * time.Second, 59 * time.Minute},
		"of a quarter of an hour":     {remaining(15*time.Minute, 450*time.Second), 450 * time.Second, 525 * time.Second},
		"of twelve hours":             {remaining(12*time.Hour, time.Hour), 1800 * time.Second, 2100 * time.Second},
		"the first of twelve hours":   {remaining(12*time.Hour, -1), 1800 * time.Second, 12 * time.Hour},
		"remembered: throttled":       {func() time.Duration { return s.ErrorLifetime(Throttled, 1) }, time.Second, 2 * time.Second},
		"remembered: again throttled": {func() time.Duration { return s.ErrorLifetime(Throttled, 100) }, 30 * time.Second, time.Minute},
		"remembered: unavailable":     {func() time.Duration { return s.ErrorLifetime(Unavailable, 1) }, 250 * time.Millisecond, 500 * time.Millisecond},
		"remembered: and again":       {func() time.Duration { return s.ErrorLifetime(Unavailable, 100) }, 15 * time.Second, 30 * time.Second},
		"remembered: denied":          {func() time.Duration { return s.ErrorLifetime(Denied, 1) }, 30 * time.Second, 30 * time.Second},
		"remembered: denied again":    {func() time.Duration { return s.ErrorLifetime(Denied, 100) }, time.Minute, time.Minute},
		"remembered: malformed":       {func() time.Duration { return s.ErrorLifetime(Malformed, 1) }, 5 * time.Minute, 5 * time.Minute},
		"retry: throttled":            {func() time.Duration { return s.RetryAfter(Throttled, 1) }, time.Second, 2 * time.Second},
		"retry: unavailable, at last": {func() time.Duration { return s.RetryAfter(Unavailable, 100) }, time.Minute, 2 * time.Minute},
		"retry: denied":               {func() time.Duration { return s.RetryAfter(Denied, 1) }, 90 * time.Second, 2 * time.Minute},
		"retry: malformed":            {func() time.Duration { return s.RetryAfter(Malformed, 1) }, 7*time.Minute + 30*time.Second, 10 * time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			least, most := drawn(tt.draw)
			if least < tt.least || most > tt.most {
				t.Errorf("%v to %v, want %v to %v", least, most, tt.least, tt.most)
			}
			if span := tt.most - tt.least; most-least < span*9/10 {
				t.Errorf("%v to %v is not all of %v to %v", least, most, tt.least, tt.most)
			}
		})
	}
}
