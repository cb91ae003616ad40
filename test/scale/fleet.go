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
	// renewal counts the calls and restarts: an event that was planned before the last one does not
	// happen.
	renewal uint32
}

// event is what a pod does in a second.
type event struct {
	pod     int32
	renewal uint32
	asks    bool // the pod asks, because it has no credentials; otherwise a renewal or a prefetch is due
}

// node is the rate limit of a node, and the calls that wait for its tokens.
type node struct {
	limiter                *credentials.Limiter
	foreground, background []event
}

type fleet struct {
	Scenario
	schedule credentials.Schedule
	chance   *rand.Rand
	start    time.Time
	second   int
	agenda   [][]event // by second
	pods     []pod
	nodes    []node
	left     float64 // of the quota
	result   Result
}

// Run simulates the scenario. The result depends on the scenario only, including its seed.
func Run(s Scenario) Result {
	seconds := int(s.Length / time.Second)
	chance := rand.New(rand.NewPCG(s.Seed, 0))
	f := &fleet{
		Scenario: s, schedule: credentials.Schedule{Rand: chance}, chance: chance, start: time.Unix(1<<30, 0),
		agenda: make([][]event, seconds), pods: make([]pod, s.Nodes*s.Pods), nodes: make([]node, s.Nodes),
		left:   float64(s.Quota),
		result: Result{Calls: make([]int, seconds), Throttled: make([]int, seconds)},
	}
	for i := range f.nodes {
		f.nodes[i].limiter = f.newLimiter()
		for range s.Pods { // have made their first calls
			f.nodes[i].limiter.Take(f.start, false)
		}
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
		f.plan(int32(i), due)
	}
	for f.second = range seconds {
		f.left = min(f.left+float64(s.Quota), float64(s.Quota))
		f.restart()
		for _, e := range f.agenda[f.second] {
			f.queue(e)
		}
		f.agenda[f.second] = nil
		first := chance.IntN(s.Nodes) // no node has the quota's first calls each time
		for i := range f.nodes {
			f.dispatch(&f.nodes[(first+i)%s.Nodes])
		}
		if f.second%60 == 59 {
			f.result.Refused = append(f.result.Refused, f.refused())
		}
	}
	return f.result
}

func (f *fleet) now() time.Time { return f.start.Add(time.Duration(f.second) * time.Second) }

// newLimiter returns the limiter of a node whose proxy has just started and holds its pods' roles.
func (f *fleet) newLimiter() *credentials.Limiter {
	l := credentials.NewLimiter(f.now())
	for range f.Pods {
		l.AddHolder(session, true)
	}
	return l
}

// plan plans a pod's next renewal, and its request for when it has no credentials by then.
// Whichever comes first makes the other one obsolete.
func (f *fleet) plan(i int32, renewAt time.Time) {
	p := &f.pods[i]
	p.renewAt = renewAt
	f.add(renewAt, event{pod: i, renewal: p.renewal})
	asked := later(later(p.expires, p.errUntil), f.now()).Add(time.Duration(f.chance.Int64N(int64(asking))))
	f.add(asked, event{pod: i, renewal: p.renewal, asks: true})
}

// add puts an event into the agenda, in the next second at the earliest.
func (f *fleet) add(at time.Time, e event) {
	if second := max(f.second+1, int(at.Sub(f.start)/time.Second)); second < len(f.agenda) {
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
	for n := turn(f.second - 1); n < turn(f.second); n++ {
		f.nodes[n] = node{limiter: f.newLimiter()}
		for i := n * f.Pods; i < (n+1)*f.Pods; i++ {
			old := f.pods[i]
			f.pods[i] = pod{renewal: old.renewal + 1}
			due := f.now()
			if f.HandOver && old.expires.After(due) {
				f.pods[i].expires = old.expires
				due = old.renewAt
			}
			f.plan(int32(i), due)
		}
	}
}

// queue queues the call of an event.
func (f *fleet) queue(e event) {
	n := &f.nodes[int(e.pod)/f.Pods]
	if e.asks {
		n.foreground = append(n.foreground, e)
	} else {
		n.background = append(n.background, e)
	}
}

// dispatch makes the calls of a node for which there are tokens.
func (f *fleet) dispatch(n *node) {
	n.foreground = f.dispatchQueue(n, n.foreground, true)
	n.background = f.dispatchQueue(n, n.background, false)
}

func (f *fleet) dispatchQueue(n *node, queue []event, foreground bool) []event {
	for i, e := range queue {
		if e.renewal != f.pods[e.pod].renewal {
			continue
		}
		if n.limiter.Take(f.now(), foreground) > 0 {
			return queue[i:]
		}
		f.call(e, n)
	}
	return nil
}

// call is one call of STS and its consequences.
func (f *fleet) call(e event, n *node) {
	p, now := &f.pods[e.pod], f.now()
	p.renewal++
	f.result.Calls[f.second]++
	failure := f.answer()
	if failure == nil {
		left := p.expires.Sub(now)
		p.expires, p.failures = now.Add(session), 0
		f.plan(e.pod, f.schedule.Renewal(p.expires, session, left))
		return
	}
	n.limiter.Observe(now, failure)
	p.failures++
	p.errUntil = now.Add(f.schedule.ErrorLifetime(failure.Kind, p.failures))
	f.plan(e.pod, now.Add(f.schedule.RetryAfter(failure.Kind, p.failures)))
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
