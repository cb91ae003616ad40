package credentials

import (
	"testing"
	"time"
)

var epoch = time.Date(2026, 11, 25, 0, 0, 0, 0, time.UTC)

// calls returns how many tokens are available in a time, if each is taken as soon as it is
// available.
func calls(p *Limiter, from time.Time, during time.Duration, waiting bool) (n int) {
	for now := from; now.Sub(from) < during; {
		wait := p.Take(now, waiting)
		if wait <= 0 {
			n++
		}
		now = now.Add(min(wait, time.Second))
	}
	return n
}

func TestBackgroundRateFollowsHolders(t *testing.T) {
	for name, tt := range map[string]struct {
		pods    int
		session time.Duration
		hourly  int // calls an hour that a steady state needs, at least
	}{
		"an hour":      {110, time.Hour, 240},
		"a quarter":    {110, 15 * time.Minute, 960},
		"twelve hours": {110, 12 * time.Hour, 10},
		"no pod":       {0, time.Hour, 0},
		"a handful":    {5, time.Hour, 11},
		"a thousand":   {1000, time.Hour, 2181},
	} {
		t.Run(name, func(t *testing.T) {
			p := NewLimiter(epoch)
			for range tt.pods {
				p.AddHolder(tt.session, true)
			}
			// Each new holder adds a token for its first call.
			if n := calls(p, epoch, time.Millisecond, false); n != tt.pods+backgroundBurst {
				t.Errorf("%d calls at once for %d pods", n, tt.pods)
			}
			n := calls(p, epoch.Add(time.Millisecond), time.Hour, false)
			least, most := 2*tt.hourly, max(4*tt.hourly, 3600*2/10)
			if n < least || n > most {
				t.Errorf("%d calls in an hour, want %d to %d", n, least, most)
			}
		})
	}
}

func TestForegroundHasItsOwnBucket(t *testing.T) {
	p := NewLimiter(epoch)
	for range 500 {
		p.Take(epoch, false)
	}
	for i := range foregroundBurst {
		if wait := p.Take(epoch, true); wait > 0 {
			t.Fatalf("call %d waits %v behind renewals", i, wait)
		}
	}
	if wait := p.Take(epoch, true); wait <= 0 || wait > 150*time.Millisecond {
		t.Errorf("the call after the burst waits %v", wait)
	}
}

func TestRateDropsAndRecovers(t *testing.T) {
	p := NewLimiter(epoch)
	calls(p, epoch, time.Millisecond, true)
	now := epoch.Add(time.Millisecond)
	during := func(d time.Duration) int {
		n := calls(p, now, d, true)
		now = now.Add(d)
		return n
	}
	if n := during(10 * time.Second); n < 95 || n > 105 {
		t.Fatalf("%d calls in ten seconds", n)
	}
	p.Observe(now, &Error{Kind: Denied})
	p.Observe(now, &Error{Kind: NodeCredentials})
	if n := during(10 * time.Second); n < 95 {
		t.Errorf("%d calls in ten seconds after denials", n)
	}
	for range 20 {
		p.Observe(now, &Error{Kind: Unavailable})
	}
	if n := during(10 * time.Second); n < 5 || n > 8 {
		t.Errorf("%d calls in the ten seconds after an outage", n)
	}
	for range 20 {
		p.Observe(now, &Error{Kind: Throttled})
	}
	if n := during(10 * time.Second); n > 1 {
		t.Errorf("%d calls in the ten seconds after throttling", n)
	}
	if n := during(4 * time.Minute); n < 300 || n > 900 {
		t.Errorf("%d calls in the four minutes after that", n)
	}
	if n := during(10 * time.Second); n < 95 || n > 105 {
		t.Errorf("%d calls in ten seconds after the recovery", n)
	}
}

// TestFailuresDoNotLowerBackgroundRate checks that twice as many calls are possible if STS fails
// half of them.
func TestFailuresDoNotLowerBackgroundRate(t *testing.T) {
	p := NewLimiter(epoch)
	for range 110 {
		p.AddHolder(time.Hour, false)
	}
	calls(p, epoch, time.Millisecond, false)
	now := epoch.Add(time.Millisecond)
	for range 20 {
		p.Observe(now, &Error{Kind: Unavailable})
	}
	if n := calls(p, now, time.Hour, false); n < 480 {
		t.Errorf("%d calls in an hour; 240 must succeed", n)
	}
}

func TestRemoveHolder(t *testing.T) {
	p := NewLimiter(epoch)
	for range 1000 {
		p.AddHolder(time.Hour, false)
	}
	for range 1000 {
		p.RemoveHolder(time.Hour)
	}
	p.AddHolder(time.Hour, false)
	p.RemoveHolder(time.Hour)
	if n := calls(p, epoch, time.Hour, false); n > 3600*minRate+backgroundBurst {
		t.Errorf("%d calls in an hour without holders", n)
	}
}

func TestIdleNodeSavesOneBurst(t *testing.T) {
	p := NewLimiter(epoch)
	for range 10 {
		p.AddHolder(time.Hour, false)
	}
	if n := calls(p, epoch.Add(24*time.Hour), time.Millisecond, false); n != backgroundBurst {
		t.Errorf("%d calls at once after an idle day", n)
	}
}

func TestRateAfterRemoveHolder(t *testing.T) {
	p := NewLimiter(epoch)
	for range 1000 {
		p.AddHolder(time.Hour, false)
	}
	for range 999 {
		p.RemoveHolder(time.Hour)
	}
	if n := calls(p, epoch, time.Hour, false); n > 3600*minRate+backgroundBurst+1 {
		t.Errorf("%d calls in an hour for one holder", n)
	}
}
