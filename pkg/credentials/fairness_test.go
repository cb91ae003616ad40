package credentials

import (
	"context"
	"fmt"
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
)

// TestFloodingPodDelaysOnlyItself lets a client change its own pod's annotation many times a
// second, request each new assumption and close the connection. Every ten seconds a new pod makes
// its first request.
func TestFloodingPodDelaysOnlyItself(t *testing.T) {
	const call = 200 * time.Millisecond
	for name, tt := range map[string]struct {
		refuse  error         // STS's answer to the flooding pod
		patient time.Duration // how long its client waits
		notHeld bool          // the watch does not show the changes yet
		minutes int           // how long it floods, 10 times a second
	}{
		"hangs up at once":                           {patient: 5 * time.Millisecond},
		"hangs up before STS answers":                {patient: 150 * time.Millisecond},
		"waits":                                      {patient: time.Hour},
		"is ahead of the watch":                      {patient: 5 * time.Millisecond, notHeld: true},
		"waits, ahead of the watch":                  {patient: time.Hour, notHeld: true},
		"is throttled":                               {patient: 5 * time.Millisecond, refuse: &Error{Kind: Throttled, Code: "Throttling"}, minutes: 15},
		"is throttled, and waits":                    {patient: time.Hour, notHeld: true, refuse: &Error{Kind: Throttled, Code: "Throttling"}, minutes: 15},
		"requests roles for which STS fails":         {patient: time.Hour, refuse: &Error{Kind: Unavailable, Code: "InternalFailure"}},
		"requests refused roles, ahead of the watch": {patient: time.Hour, notHeld: true, refuse: &Error{Kind: Denied, Code: "AccessDenied"}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				sts := &fakeSTS{latency: call, refuse: func(a roles.Assumption) error {
					if a.SessionName == "flood" {
						return tt.refuse
					}
					return nil
				}}
				c := running(t, sts, Config{})
				before := runtime.NumGoroutine()
				ctx, hangUp := context.WithCancel(t.Context())
				defer hangUp()
				newcomer := make(chan time.Duration, 1)
				waiting, newcomers, longest, goroutines, entries := 0, 0, time.Duration(0), 0, 0
				everySecond, seconds := 50, 120
				if tt.minutes > 0 {
					everySecond, seconds = 10, 60*tt.minutes
				}
				for i := range everySecond * seconds {
					a := assumption(fmt.Sprint("flood-", i))
					a.SessionName = "flood"
					if !tt.notHeld {
						c.Hold("flood", a)
					}
					go func() {
						ctx, cancel := context.WithTimeout(ctx, tt.patient)
						defer cancel()
						c.Get(ctx, "flood", a)
					}()
					if i%(10*everySecond) == 5*everySecond {
						newcomers++
						waiting++
						go func() {
							began := time.Now()
							pod := fmt.Sprint("new-", i)
							if _, err := c.Get(t.Context(), pod, assumption(pod)); err != nil {
								t.Errorf("a new pod: %v", err)
							}
							newcomer <- time.Since(began)
						}()
					}
					time.Sleep(time.Second / time.Duration(everySecond))
					synctest.Wait()
					select {
					case took := <-newcomer:
						waiting--
						longest = max(longest, took)
					default:
					}
					if n := c.Stats().Entries; n > 1000 {
						t.Fatalf("%d entries after %d changes", n, i+1)
					}
					goroutines, entries = max(goroutines, runtime.NumGoroutine()-before), max(entries, c.Stats().Entries)
				}
				for range waiting {
					longest = max(longest, <-newcomer)
				}
				t.Logf("new pods waited up to %v; %d goroutines, %d entries, %d calls", longest, goroutines, entries, sts.count())
				if newcomers != seconds/10 || longest > 2*call {
					t.Errorf("%d new pods waited up to %v, and one call takes %v", newcomers, longest, call)
				}
				if goroutines > 25 || entries > 60 {
					t.Errorf("up to %d goroutines and %d entries", goroutines, entries)
				}
				if n := sts.count() - newcomers; n > 50+seconds/2 {
					t.Errorf("%d calls for the flooding pod", n)
				}
			})
		})
	}
}

// inOrder is an STS that records the roles that it is called for.
type inOrder struct {
	fakeSTS
	roles []string
}

func (s *inOrder) AssumeRole(ctx context.Context, a roles.Assumption) (*Credentials, error) {
	s.set(func(*fakeSTS) { s.roles = append(s.roles, a.RoleName()) })
	return s.fakeSTS.AssumeRole(ctx, a)
}

func TestPodsAreServedRoundRobin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := new(inOrder)
		c := running(t, sts, Config{})
		withoutTokens(c, 0)
		get := func(pod, role string) {
			go c.Get(t.Context(), pod, assumption(role))
			synctest.Wait()
		}
		get("a", "a1")
		get("b", "b1")
		get("a", "a2")
		get("c", "c1")
		get("b", "b2")
		get("b", "b3")
		time.Sleep(110 * time.Millisecond) // the time of one token
		get("a", "a3")
		time.Sleep(time.Second)
		sts.mu.Lock()
		defer sts.mu.Unlock()
		if got := fmt.Sprint(sts.roles); got != "[a2 b3 c1 a3]" {
			t.Errorf("called for %s", got)
		}
	})
}

// TestPodHasOneCallAtATime requests one role after the other while STS hangs.
func TestPodHasOneCallAtATime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := &fakeSTS{latency: time.Hour}
		c := running(t, sts, Config{})
		for i := range 100 {
			ctx, hangUp := context.WithCancel(t.Context())
			go c.Get(ctx, "pod", assumption(fmt.Sprint(i)))
			synctest.Wait()
			hangUp()
			time.Sleep(100 * time.Millisecond) // 10 s in total, less than the timeout of the call
			c.wakeUp()                         // as the end of a neighbour's call does
			synctest.Wait()
		}
		sts.set(func(s *fakeSTS) {
			if s.peak != 1 {
				t.Errorf("%d calls at once", s.peak)
			}
			s.latency = 0
		})
		mustGetFor(t, c, "neighbour", assumption("neighbour's"))
		ctx, hangUp := context.WithTimeout(t.Context(), time.Minute)
		defer hangUp()
		if _, err := c.Get(ctx, "pod", assumption("last")); err != nil {
			t.Errorf("after its call has ended: %v", err)
		}
	})
}

func TestRequestsDoNotWaitBehindPrefetches(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := running(t, new(fakeSTS), Config{})
		withoutBackgroundTokens(c)
		c.Hold("neighbour", assumption("neighbour's")) // takes its own token
		synctest.Wait()
		c.Hold("neighbour", assumption("a")) // an existing holder has none
		time.Sleep(10 * time.Second)
		if has(c, assumption("a")) {
			t.Fatal("a background token was left")
		}
		start := time.Now()
		mustGet(t, c, assumption("a"))
		mustGet(t, c, assumption("b"))
		if waited := time.Since(start); waited > 0 {
			t.Errorf("a request waited %v", waited)
		}
	})
}

// TestRequestsGoFirstAfterThrottling starts a node while STS throttles, and then ends the
// throttling.
func TestRequestsGoFirstAfterThrottling(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := &fakeSTS{err: &Error{Kind: Throttled, Code: "Throttling"}, latency: 100 * time.Millisecond}
		c := running(t, sts, Config{})
		for i := range 110 {
			c.Hold(fmt.Sprint(i), assumption(fmt.Sprint(i)))
		}
		time.Sleep(5 * time.Minute)
		if n := sts.count(); n > 250 {
			t.Errorf("%d calls in five minutes of throttling", n)
		}
		sts.set(func(s *fakeSTS) { s.err = nil })
		start, before := time.Now(), sts.count()
		mustGet(t, c, assumption("waits"))
		if waited, others := time.Since(start), sts.count()-before-1; waited > time.Minute || others > 8 {
			t.Errorf("a request waited %v behind %d other calls", waited, others)
		}
		time.Sleep(20 * time.Minute)
		for i := range 110 {
			if !has(c, assumption(fmt.Sprint(i))) {
				t.Fatal("not all are prefetched after twenty minutes")
			}
		}
	})
}
