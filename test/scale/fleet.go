// Package scale simulates a fleet of nodes and the STS of their account, in steps of a second. The
// nodes use the Schedule and the limits of pkg/credentials, as the proxy does.
package scale

import (
	"math/rand/v2"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/credentials"
)

// Scenario describes a fleet and its disturbances. A zero disturbance does not happen.
type Scenario struct {
	Name string
	// Nodes is the number of nodes with Pods pods each. Each pod has a session of an hour.
	Nodes, Pods int
	// Together gives all pods their first credentials in the first minute, which the result leaves
	// out. Otherwise the fleet has run for long.
	Together bool
	// Length is the simulated time.
	Length time.Duration
	// Quota is how many calls a second STS accepts; it throttles the others. Zero means no limit.
	Quota int
	// RestartAt is when restarts of the proxies begin, one after the other for RestartTime. Each
	// loses its credentials unless HandOver is set.
	RestartAt, RestartTime time.Duration
	HandOver               bool
	// BrownoutAt is when STS begins to fail the fraction Failing of the calls, for BrownoutTime.
	BrownoutAt, BrownoutTime time.Duration
	Failing                  float64
	// Seed determines the run.
	Seed uint64
}

// Result of a simulation.
type Result struct {
	// Calls and Throttled count the calls of each second, and those above the quota.
	Calls, Throttled []int
	// Refused counts the pods without valid credentials at the end of each minute.
	Refused []int
}

const (
	session = time.Hour
	// asking is how often a pod without credentials asks for them.
	asking = 10 * time.Second
)

// pod is a pod's credentials on its node.
type pod struct {
	expires  time.Time
	errUntil time.Time
	renewAt  time.Time // when its next renewal is planned
	failures int
	// renewal counts the planned renewals: one that was planned before a restart does not happen.
	renewal uint32
}

// event is what a pod does in a second.
type event struct {
	pod     int32
	renewal uint32
	kind    kind
	ticket  credentials.Reservation
}

type kind uint8

const (
	renew  kind = iota // a renewal or a prefetch is due
	asks               // the pod asks, because it has no credentials
	queued             // the call is at the head of the node's queue
	urgent             // as queued, for a call that the pod waits for
)

type fleet struct {
	Scenario
	schedule credentials.Schedule
	chance   *rand.Rand
	start    time.Time
	second   int
	agenda   [][]event // by second
	pods     []pod
	paces    []*credentials.Limiter
	left     float64 // of the quota
	result   Result
}

// Run simulates the scenario. The result depends on the scenario only, including its seed.
func Run(s Scenario) Result {
	seconds := int(s.Length / time.Second)
	chance := rand.New(rand.NewPCG(s.Seed, 0))
	f := &fleet{
		Scenario: s, schedule: credentials.Schedule{Rand: chance}, chance: chance, start: time.Unix(1<<30, 0),
		agenda: make([][]event, seconds), pods: make([]pod, s.Nodes*s.Pods), paces: make([]*credentials.Limiter, s.Nodes),
		left:   float64(s.Quota),
		result: Result{Calls: make([]int, seconds), Throttled: make([]int, seconds)},
	}
	for node := range f.paces {
		f.paces[node] = f.newPace()
	}
	for i := range f.pods {
		got := f.start
		if s.Together {
			got = got.Add(time.Duration(chance.Int64N(int64(time.Minute))))
		}
		due := f.schedule.Renewal(got.Add(session), session, -1)
		if !s.Together {
			// Each pod is somewhere between two renewals.
			due = f.schedule.Renewal(got.Add(session), session, session)
			ago := time.Duration(chance.Int64N(int64(due.Sub(got))))
			got, due = got.Add(-ago), due.Add(-ago)
		}
		f.pods[i].expires = got.Add(session)
		f.plan(due, event{pod: int32(i), kind: renew})
	}
	for f.second = range seconds {
		f.left = min(f.left+float64(s.Quota), float64(s.Quota))
		f.restart()
		for i := 0; i < len(f.agenda[f.second]); i++ { // the body may append to it
			f.happen(f.agenda[f.second][i])
		}
		f.agenda[f.second] = nil
		if f.second%60 == 59 {
			f.result.Refused = append(f.result.Refused, f.refused())
		}
	}
	return f.result
}

func (f *fleet) now() time.Time { return f.start.Add(time.Duration(f.second) * time.Second) }

// newPace is that of a node with its pods, that has run for a while.
func (f *fleet) newPace() *credentials.Limiter {
	p := credentials.NewLimiter(f.now())
	for range f.Pods {
		p.AddHolder(f.now(), session, true)
	}
	return p
}

// plan puts an event into the agenda, in the current second at the earliest.
func (f *fleet) plan(at time.Time, e event) {
	if e.kind == renew {
		f.pods[e.pod].renewAt = at
	}
	if second := max(f.second, int(at.Sub(f.start)/time.Second)); second < len(f.agenda) {
		e.renewal = f.pods[e.pod].renewal
		f.agenda[second] = append(f.agenda[second], e)
	}
}

// restart removes the credentials of the nodes that restart in this second, or with HandOver all
// but the valid ones and their planned renewals.
func (f *fleet) restart() {
	if f.RestartTime == 0 {
		return
	}
	turn := func(second int) int {
		part := float64(time.Duration(second)*time.Second-f.RestartAt) / float64(f.RestartTime)
		return int(min(1, max(0, part)) * float64(f.Nodes))
	}
	for node := turn(f.second - 1); node < turn(f.second); node++ {
		f.paces[node] = f.newPace()
		for i := node * f.Pods; i < (node+1)*f.Pods; i++ {
			old := f.pods[i]
			f.pods[i] = pod{renewal: old.renewal + 1}
			due := f.now()
			if f.HandOver && old.expires.After(due) {
				f.pods[i].expires = old.expires
				due = old.renewAt
			}
			f.plan(due, event{pod: int32(i), kind: renew})
		}
	}
}

func (f *fleet) happen(e event) {
	p, pace, now := &f.pods[e.pod], f.paces[int(e.pod)/f.Pods], f.now()
	if e.renewal != p.renewal {
		return
	}
	switch e.kind {
	case asks:
		switch {
		case p.expires.After(now):
			return
		case p.errUntil.After(now):
			f.plan(p.errUntil.Add(asking/2), e)
			return
		}
		e.kind, e.ticket = urgent, pace.Reserve(now, true)
	case renew:
		e.kind, e.ticket = queued, pace.Reserve(now, false)
	}
	if wait := e.ticket.Delay(now); wait >= time.Second {
		// How fast the queue moves changes: the proxy looks each second, which would take this long.
		f.plan(now.Add(min(wait, 10*time.Second)), e)
		return
	}
	f.call(e, p, pace, now)
}

// call is one call of STS and its consequences.
func (f *fleet) call(e event, p *pod, pace *credentials.Limiter, now time.Time) {
	p.renewal++
	f.result.Calls[f.second]++
	failure := f.answer()
	pace.Observe(now, failure)
	if failure == nil {
		left := p.expires.Sub(now)
		p.expires, p.failures = now.Add(session), 0
		f.plan(f.schedule.Renewal(p.expires, session, left), event{pod: e.pod, kind: renew})
		return
	}
	p.failures++
	p.errUntil = now.Add(f.schedule.ErrorLifetime(failure.Kind, p.failures))
	retry := now.Add(f.schedule.RetryAfter(failure.Kind, p.failures))
	if !p.expires.After(retry) {
		// The pod has no credentials then: its own request or the next try is first.
		if asked := later(p.expires, p.errUntil).Add(time.Duration(f.chance.Int64N(int64(asking)))); asked.Before(retry) {
			f.plan(asked, event{pod: e.pod, kind: asks})
			return
		}
	}
	f.plan(retry, event{pod: e.pod, kind: renew})
}

// answer returns STS's answer to another call in this second.
func (f *fleet) answer() *credentials.Error {
	at := time.Duration(f.second) * time.Second
	if f.Quota > 0 {
		if f.left < 1 {
			f.result.Throttled[f.second]++
			return &credentials.Error{Kind: credentials.Throttled, Code: "Throttling"}
		}
		f.left--
	}
	if at >= f.BrownoutAt && at < f.BrownoutAt+f.BrownoutTime && f.chance.Float64() < f.Failing {
		return &credentials.Error{Kind: credentials.Unavailable, Code: "ServiceUnavailable"}
	}
	return nil
}

func (f *fleet) refused() (n int) {
	now := f.now()
	for i := range f.pods {
		if !f.pods[i].expires.After(now) {
			n++
		}
	}
	return n
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// PerMinute returns the mean number per second of each minute.
func PerMinute(bySecond []int) []float64 {
	var minutes []float64
	for i := 0; i+60 <= len(bySecond); i += 60 {
		sum := 0
		for _, n := range bySecond[i : i+60] {
			sum += n
		}
		minutes = append(minutes, float64(sum)/60)
	}
	return minutes
}
