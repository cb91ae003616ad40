package credentials

import (
	"testing"
	"time"
)

// drawn returns the shortest and the longest of many random durations.
func drawn(draw func() time.Duration) (least, most time.Duration) {
	least = draw()
	for range 2000 {
		d := draw()
		least, most = min(least, d), max(most, d)
	}
	return least, most
}

// TestRangesOfDelays checks that each random duration uses all of its range, and no more.
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
		"a renewal":                         {remaining(time.Hour, 1800*time.Second), 1800 * time.Second, 2100 * time.Second},
		"a renewal at minRemaining":         {remaining(time.Hour, minRemaining), 1800 * time.Second, 2100 * time.Second},
		"a first renewal":                   {remaining(time.Hour, -1), 1800 * time.Second, 59 * time.Minute},
		"a renewal below minRemaining":      {remaining(time.Hour, minRemaining-1), 1800 * time.Second, 59 * time.Minute},
		"a session of 15 minutes":           {remaining(15*time.Minute, 450*time.Second), 450 * time.Second, 525 * time.Second},
		"a session of twelve hours":         {remaining(12*time.Hour, time.Hour), 1800 * time.Second, 2100 * time.Second},
		"the first renewal of twelve hours": {remaining(12*time.Hour, -1), 1800 * time.Second, 12 * time.Hour},
		"cached: throttled":                 {func() time.Duration { return s.ErrorLifetime(Throttled, 1) }, time.Second, 2 * time.Second},
		"cached: throttled many times":      {func() time.Duration { return s.ErrorLifetime(Throttled, 100) }, 30 * time.Second, time.Minute},
		"cached: unavailable":               {func() time.Duration { return s.ErrorLifetime(Unavailable, 1) }, 250 * time.Millisecond, 500 * time.Millisecond},
		"cached: unavailable many times":    {func() time.Duration { return s.ErrorLifetime(Unavailable, 100) }, 15 * time.Second, 30 * time.Second},
		"cached: denied":                    {func() time.Duration { return s.ErrorLifetime(Denied, 1) }, 30 * time.Second, 30 * time.Second},
		"cached: denied many times":         {func() time.Duration { return s.ErrorLifetime(Denied, 100) }, time.Minute, time.Minute},
		"cached: malformed":                 {func() time.Duration { return s.ErrorLifetime(Malformed, 1) }, 5 * time.Minute, 5 * time.Minute},
		"retry: throttled":                  {func() time.Duration { return s.RetryAfter(Throttled, 1) }, time.Second, 2 * time.Second},
		"retry: unavailable many times":     {func() time.Duration { return s.RetryAfter(Unavailable, 100) }, time.Minute, 2 * time.Minute},
		"retry: denied":                     {func() time.Duration { return s.RetryAfter(Denied, 1) }, 90 * time.Second, 2 * time.Minute},
		"retry: malformed":                  {func() time.Duration { return s.RetryAfter(Malformed, 1) }, 7*time.Minute + 30*time.Second, 10 * time.Minute},
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
