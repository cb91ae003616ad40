package scale

import (
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func small(change func(*Scenario)) Scenario {
	s := Scenario{Nodes: 50, Pods: 110, Length: 3 * time.Hour, Seed: 1}
	if change != nil {
		change(&s)
	}
	return s
}

func sum(all []int) (n int) {
	for _, v := range all {
		n += v
	}
	return n
}

func TestOneSeedIsOneFleet(t *testing.T) {
	s := small(func(s *Scenario) { s.BrownoutAt, s.BrownoutTime, s.Failing = time.Hour, time.Hour, 0.5 })
	one, same := Run(s), Run(s)
	if d := cmp.Diff(one, same); d != "" {
		t.Errorf("the same seed: %s", d)
	}
	s.Seed = 2
	if cmp.Equal(one, Run(s)) {
		t.Error("another seed makes no difference")
	}
}

func TestSteadyFleetAsksEachHourTwiceAndABit(t *testing.T) {
	r := Run(small(nil))
	hourly := float64(sum(r.Calls)) / 3 / (50 * 110)
	if hourly < 2 || hourly > 2.4 || sum(r.Refused) != 0 {
		t.Errorf("%.2f calls an hour for a pod, %d refused", hourly, sum(r.Refused))
	}
}

// peak returns the ratio of the busiest minute to the mean.
func peak(calls []int) float64 {
	minutes := PerMinute(calls)
	return slices.Max(minutes) * float64(len(calls)) / float64(sum(calls))
}

// TestCallsOfAFleetHaveNoPeak: the busiest minute has less than half as much again as the mean.
func TestCallsOfAFleetHaveNoPeak(t *testing.T) {
	restart := func(s *Scenario) { s.RestartAt, s.RestartTime, s.HandOver = time.Hour, time.Hour, true }
	brownout := func(s *Scenario) { s.BrownoutAt, s.BrownoutTime, s.Failing = time.Hour, time.Hour, 0.2 }
	for name, change := range map[string]func(*Scenario){
		"steady":           func(*Scenario) {},
		"started together": func(s *Scenario) { s.Together = true },
		"restarted":        restart,
		"brown-out":        brownout,
		"both":             func(s *Scenario) { restart(s); brownout(s) },
		"killed":           func(s *Scenario) { restart(s); s.HandOver, s.Nodes = false, 500 }, // one alone causes no peak
	} {
		t.Run(name, func(t *testing.T) {
			s := small(change)
			s.Length = 5 * time.Hour
			if p := peak(Run(s).Calls); p > 1.5 {
				t.Errorf("the peak is %.2f times the mean", p)
			}
		})
	}
}

// TestOutageLeavesNoEcho: from an hour after the outage on, the calls have no peak.
func TestOutageLeavesNoEcho(t *testing.T) {
	s := small(func(s *Scenario) { s.BrownoutAt, s.BrownoutTime, s.Failing = 30*time.Minute, time.Hour, 1 })
	s.Length = 6 * time.Hour
	r := Run(s)
	if p := peak(r.Calls[int(150*time.Minute/time.Second):]); p > 1.5 {
		t.Errorf("the peak is %.2f times the mean", p)
	}
}

func TestHalfOfSTSIsEnoughForEverybody(t *testing.T) {
	r := Run(small(func(s *Scenario) { s.BrownoutAt, s.BrownoutTime, s.Failing = time.Hour, time.Hour, 0.5 }))
	if n := sum(r.Refused); n != 0 {
		t.Errorf("%d pod-minutes without credentials", n)
	}
}

func TestRestartedNodesAskForEachPodOnce(t *testing.T) {
	r := Run(small(func(s *Scenario) { s.RestartAt, s.RestartTime = 30*time.Minute, 10*time.Minute }))
	steady := Run(small(nil))
	// In the ten minutes each pod's credentials are fetched, and few are renewed besides.
	calls, before := sum(r.Calls[1800:2400]), sum(steady.Calls[1800:2400])
	if pods := 50 * 110; calls < pods || calls > pods+before {
		t.Errorf("%d calls for %d pods", calls, pods)
	}
}

func TestNodesThatHandOverAskForNothingMore(t *testing.T) {
	r := Run(small(func(s *Scenario) { s.RestartAt, s.RestartTime, s.HandOver = 30*time.Minute, 10*time.Minute, true }))
	steady := Run(small(nil))
	if calls, before := sum(r.Calls), sum(steady.Calls); calls > before*101/100 || calls < before*99/100 || sum(r.Refused) != 0 {
		t.Errorf("%d calls, and %d without the restart; %d refused", calls, before, sum(r.Refused))
	}
}

// TestFleetRecoversFromAnOutage: all pods have credentials again in the end, also if they need
// more calls than the quota.
func TestFleetRecoversFromAnOutage(t *testing.T) {
	r := Run(small(func(s *Scenario) {
		s.BrownoutAt, s.BrownoutTime, s.Failing, s.Quota = 30*time.Minute, time.Hour, 1, 6
	}))
	if n := r.Refused[89]; n < 50*110*9/10 {
		t.Errorf("%d pods are without credentials at the end of an hour's outage: was there one?", n)
	}
	if n := r.Refused[len(r.Refused)-1]; n != 0 {
		t.Errorf("%d pods are without credentials an hour and a half later", n)
	}
}
