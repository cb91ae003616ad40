package credentials

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
	"github.com/kube2iam-cni/kube2iam-cni/test/sts"
)

// observed counts what an Observer is told.
type observed struct {
	mu           sync.Mutex
	assumed      map[string]int
	hits, misses int
	longest      time.Duration
}

func (o *observed) Assumed(outcome string, took time.Duration) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.assumed == nil {
		o.assumed = map[string]int{}
	}
	o.assumed[outcome]++
	o.longest = max(o.longest, took)
}

func (o *observed) Asked(hit bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if hit {
		o.hits++
	} else {
		o.misses++
	}
}

func TestObserverIsToldOfCallsAndOfHits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := new(observed)
		sts := &fakeSTS{latency: time.Second}
		c := running(t, sts, Config{Observer: o})
		mustGet(t, c, assumption("a"))
		mustGet(t, c, assumption("a"))
		sts.set(func(s *fakeSTS) { s.err = &Error{Kind: Denied} })
		for range 2 { // the second is answered by what STS said to the first
			if _, err := c.Get(t.Context(), "pod", assumption("b")); err == nil {
				t.Error("credentials")
			}
		}
		if o.assumed["ok"] != 1 || o.assumed["denied"] != 1 || o.longest != time.Second || o.hits != 2 || o.misses != 2 {
			t.Errorf("%+v", o)
		}
	})
}

func TestEvictionSparesWhatFlies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := &fakeSTS{latency: time.Second}
		c := running(t, sts, Config{})
		var wg sync.WaitGroup
		wg.Go(func() { mustGet(t, c, assumption("flies")) })
		synctest.Wait()
		c.mu.Lock()
		for i := range maxEntries - 1 {
			c.entries[assumption(fmt.Sprint(i))] = &entry{idleUntil: time.Now().Add(time.Hour)}
		}
		c.mu.Unlock()
		wg.Go(func() { mustGet(t, c, assumption("new")) })
		synctest.Wait()
		wg.Go(func() { mustGet(t, c, assumption("flies")) })
		wg.Wait()
		if n := sts.calls[assumption("flies")]; n != 1 {
			t.Errorf("%d calls at once for the same", n)
		}
	})
}

func TestThirdChangeIsFetchedWhenItsTimeComes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := running(t, new(fakeSTS), Config{})
		c.Hold("pod", assumption("1"))
		c.Hold("pod", assumption("2"))
		synctest.Wait()
		c.Hold("pod", assumption("3"))
		time.Sleep(changeInterval + time.Second)
		if !has(c, assumption("3")) {
			t.Error("it is not fetched ahead in time")
		}
	})
}

func TestChangeToWhatWasRefusedDoesNotWaitForItsNextTry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := &fakeSTS{err: &Error{Kind: Denied}}
		c := running(t, sts, Config{})
		if _, err := c.Get(t.Context(), "pod", assumption("a")); err == nil {
			t.Fatal("credentials")
		}
		time.Sleep(31 * time.Second) // the refusal counts no more, and its next try would be at 90 seconds at the earliest
		sts.set(func(s *fakeSTS) { s.err = nil })
		for _, role := range []string{"1", "2", "a"} {
			c.Hold("pod", assumption(role))
		}
		time.Sleep(changeInterval + time.Second)
		if !has(c, assumption("a")) {
			t.Error("it is not fetched ahead in time")
		}
	})
}

func TestPaceForgetsWhoLetGo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := running(t, new(fakeSTS), Config{})
		for i := range 100 {
			c.Hold(fmt.Sprint(i), assumption(fmt.Sprint(i)))
		}
		synctest.Wait()
		for i := range 100 {
			c.Forget(fmt.Sprint(i))
		}
		if c.limiter.held != 0 || c.limiter.need > 1e-9 {
			t.Errorf("%d are held, which need %v calls a second", c.limiter.held, c.limiter.need)
		}
	})
}

// TestPodsThatWentLeaveNoCallSlotOrToken has pods come and go while there is no token for what is fetched ahead.
func TestPodsThatWentLeaveNoCallSlotOrToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := new(fakeSTS)
		c := running(t, sts, Config{})
		withoutBackgroundTokens(c)
		for i := range 100 {
			c.Hold(fmt.Sprint(i), assumption(fmt.Sprint(i)))
		}
		synctest.Wait()
		for i := range 100 {
			c.Forget(fmt.Sprint(i))
		}
		synctest.Wait()
		if c.limiter.firstCalls != 0 || c.backgroundCalls != 0 || len(c.background) != 0 || sts.count() != 100 {
			t.Errorf("%d tokens, %d running and %d queued calls, %d calls", c.limiter.firstCalls, c.backgroundCalls, len(c.background), sts.count())
		}
	})
}

func TestWhoWaitsIsServedThoughTheHolderLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := running(t, new(fakeSTS), Config{})
		withoutTokens(c, 20)
		c.Hold("pod", assumption("a"))
		var wg sync.WaitGroup
		wg.Go(func() { mustGet(t, c, assumption("a")) })
		synctest.Wait()
		c.Forget("pod")
		wg.Wait()
	})
}

func TestCredentialsGoWithTheirLastHolderThoughAskedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := running(t, new(fakeSTS), Config{})
		c.Hold("pod", assumption("a"))
		mustGet(t, c, assumption("a"))
		c.Forget("pod")
		if has(c, assumption("a")) {
			t.Error("they stay")
		}
	})
}

func TestFailureIsTriedAgainAtItsTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := &fakeSTS{err: &Error{Kind: Unavailable}, latency: 10 * time.Millisecond}
		c := running(t, sts, Config{})
		c.Hold("pod", assumption("a"))
		time.Sleep(20 * time.Millisecond)
		sts.set(func(s *fakeSTS) { s.err = nil })
		time.Sleep(3 * time.Second)
		if !has(c, assumption("a")) {
			t.Error("nobody tried again")
		}
	})
}

func TestSuccessForgetsFailures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := &fakeSTS{err: &Error{Kind: Unavailable}}
		c := running(t, sts, Config{})
		c.Hold("pod", assumption("a"))
		time.Sleep(10 * time.Minute)
		sts.set(func(s *fakeSTS) { s.err = nil })
		time.Sleep(3 * time.Minute)
		c.mu.Lock()
		defer c.mu.Unlock()
		if e := c.entries[assumption("a")]; e.document == nil || e.failures != 0 {
			t.Errorf("%d failures in a row after a success", e.failures)
		}
	})
}

func TestEndLogsNoFailures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		c := newCache(&fakeSTS{latency: time.Hour}, Config{Log: slog.New(slog.NewTextHandler(&log, nil))})
		c.Hold("pod", assumption("a"))
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := c.Run(ctx); err != nil || log.Len() > 0 {
			t.Errorf("%v, logged %s", err, &log)
		}
	})
}

func TestRefusedRoleIsTriedRarely(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := &fakeSTS{err: &Error{Kind: Denied}}
		c := running(t, sts, Config{})
		c.Hold("pod", assumption("a"))
		time.Sleep(time.Hour)
		if n := sts.count(); n < 30 || n > 41 {
			t.Errorf("%d calls in an hour", n)
		}
	})
}

func TestHangingSTSIsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := running(t, &fakeSTS{latency: time.Hour}, Config{})
		start := time.Now()
		if _, err := c.Get(t.Context(), "pod", assumption("a")); err == nil || time.Since(start) > 20*time.Second {
			t.Errorf("%v after %v", err, time.Since(start))
		}
	})
}

func TestWhoComesBackJoinsTheFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := &fakeSTS{latency: time.Second}
		c := running(t, sts, Config{})
		c.Hold("one", assumption("a"))
		synctest.Wait()
		c.Forget("one")
		c.Hold("two", assumption("a"))
		time.Sleep(2 * time.Second)
		if n := sts.count(); n != 1 || !has(c, assumption("a")) {
			t.Errorf("%d calls", n)
		}
	})
}

func TestWhoIsInAHurryLeavesItsSlot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := running(t, new(fakeSTS), Config{})
		withoutBackgroundTokens(c)
		for i := range maxBackgroundCalls {
			c.Hold(fmt.Sprint(i), assumption(fmt.Sprint(i)))
		}
		synctest.Wait()
		for i := range maxBackgroundCalls {
			mustGet(t, c, assumption(fmt.Sprint(i)))
		}
		synctest.Wait()
		if c.backgroundCalls != 0 || len(c.background) != 0 {
			t.Errorf("%d calls run and %d are queued", c.backgroundCalls, len(c.background))
		}
	})
}

func TestEndWaitsForNoToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCache(new(fakeSTS), Config{Log: slog.New(slog.DiscardHandler)})
		withoutBackgroundTokens(c)
		for i := range 2 * maxBackgroundCalls {
			c.Hold(fmt.Sprint(i), assumption(fmt.Sprint(i)))
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		start := time.Now()
		if err := c.Run(ctx); err != nil || time.Since(start) > time.Second {
			t.Errorf("%v after %v", err, time.Since(start))
		}
	})
}

// slowToEnd is an STS whose calls take a second more after their context has ended.
type slowToEnd struct{ ended atomic.Bool }

func (s *slowToEnd) AssumeRole(ctx context.Context, _ roles.Assumption) (*Credentials, error) {
	<-ctx.Done()
	time.Sleep(time.Second)
	s.ended.Store(true)
	return nil, ctx.Err()
}

func TestEndWaitsForFlights(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := new(slowToEnd)
		c := newCache(sts, Config{Log: slog.New(slog.DiscardHandler)})
		c.Hold("pod", assumption("a"))
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := c.Run(ctx); err != nil || !sts.ended.Load() {
			t.Errorf("%v, and a flight is in the air", err)
		}
	})
}

func TestIdleNodeSavesUpNoMoreThanItsPodsAre(t *testing.T) {
	p := NewLimiter(epoch)
	for range 10 {
		p.AddHolder(time.Hour, false)
	}
	if n := calls(p, epoch.Add(24*time.Hour), time.Millisecond, false); n != backgroundBurst {
		t.Errorf("%d calls at once after a day", n)
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
		t.Errorf("%d calls in an hour for one", n)
	}
}

// TestEntryWithFlightIsNotRemoved has one getter wait for longer than what nobody holds is kept.
func TestEntryWithFlightIsNotRemoved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := new(fakeSTS)
		c := running(t, sts, Config{})
		withoutTokens(c, 1500)
		var wg sync.WaitGroup
		wg.Go(func() { mustGet(t, c, assumption("a")) })
		time.Sleep(2*idleLifetime + 5*time.Second)
		wg.Go(func() { mustGet(t, c, assumption("a")) })
		wg.Wait()
		if n := sts.count(); n != 1 {
			t.Errorf("%d calls", n)
		}
	})
}

func TestExportOmitsUnheldCredentials(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := running(t, new(fakeSTS), Config{})
		mustGet(t, c, assumption("a"))
		if exported, err := c.Export(); err != nil || string(exported) != "[]" {
			t.Errorf("%d bytes, %v", len(exported), err)
		}
	})
}

func TestDueImportIsRenewedAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := new(fakeSTS)
		c := running(t, sts, Config{})
		a := assumption("a")
		c.Hold("pod", a)
		time.Sleep(10 * time.Second)
		exported, err := json.Marshal([]exportedEntry{{Assumption: a, Document: []byte("{}"), Expiration: time.Now().Add(time.Hour), RenewAt: time.Now().Add(time.Second)}})
		if err != nil {
			t.Fatal(err)
		}
		if n, err := c.Import(exported); err != nil || n != 1 {
			t.Fatalf("imported %d, %v", n, err)
		}
		time.Sleep(2 * time.Second)
		if n := sts.count(); n != 2 {
			t.Errorf("%d calls", n)
		}
	})
}

func TestPending(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := &fakeSTS{latency: time.Second, refuse: func(a roles.Assumption) error {
			if a == assumption("denied") {
				return &Error{Kind: Denied}
			}
			return nil
		}}
		c := running(t, sts, Config{})
		c.Hold("one", assumption("denied"))
		c.Hold("two", assumption("a"))
		if n := c.Stats().Pending; n != 2 {
			t.Errorf("%d are pending", n)
		}
		time.Sleep(2 * time.Second)
		var wg sync.WaitGroup
		wg.Go(func() { mustGet(t, c, assumption("nobody's")) })
		synctest.Wait()
		if n := c.Stats().Pending; n != 0 {
			t.Errorf("%d are pending", n)
		}
		wg.Wait()
	})
}

func TestFIPSUsesNodeRegion(t *testing.T) {
	cloud(t)
	s := client(t, STSConfig{FIPS: true, Partition: "aws", Region: func(context.Context) (string, error) { return "eu-west-3", nil }})
	if s.Endpoint() != "https://sts-fips.eu-west-3.amazonaws.com" {
		t.Error(s.Endpoint())
	}
}

func TestIntermediateRoleIsRenewed(t *testing.T) {
	s := cloud(t)
	between := account + "between"
	s.PutRole(sts.Role{ARN: account + "reader", Trusts: []string{between}})
	s.PutRole(sts.Role{ARN: between, Trusts: []string{nodeName}})
	a := roles.Assumption{RoleARN: account + "reader", SessionName: "ns.pod", Duration: time.Hour}
	c := client(t, STSConfig{Endpoint: s.URL(), IntermediateRole: between, SessionName: "kube2iam.node-1"})
	if _, err := c.AssumeRole(t.Context(), a); err != nil {
		t.Fatal(err)
	}
	if at, err := c.client.Config.Credentials.ExpiresAt(); err != nil || time.Until(at) > MaxChained-intermediateMargin {
		t.Errorf("in %v, %v", time.Until(at), err)
	}
	c.client.Config.Credentials.Expire()
	s.SetFault(sts.Unavailable)
	_, err := c.AssumeRole(t.Context(), a)
	if e, ok := errors.AsType[*Error](err); !ok || e.Kind != Unavailable {
		t.Errorf("%v, want it to be STS's fault", err)
	}
}

func TestIncompleteResponse(t *testing.T) {
	cloud(t)
	all := []string{"<AccessKeyId>ASIA1</AccessKeyId>", "<SecretAccessKey>s</SecretAccessKey>", "<SessionToken>t</SessionToken>", "<Expiration>2099-01-01T00:00:00Z</Expiration>"}
	for i := range len(all) + 1 {
		some := strings.Join(slices.Delete(slices.Clone(all), min(i, len(all)-1), min(i+1, len(all))), "")
		if i == len(all) {
			some = strings.Join(all, "")
		}
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprint(w, "<AssumeRoleResponse><AssumeRoleResult><Credentials>"+some+"</Credentials></AssumeRoleResult></AssumeRoleResponse>")
		}))
		_, err := client(t, STSConfig{Endpoint: s.URL}).AssumeRole(t.Context(), roles.Assumption{RoleARN: account + "reader", SessionName: "ns.pod", Duration: time.Hour})
		s.Close()
		if e, ok := errors.AsType[*Error](err); (i < len(all)) != (ok && e.Code == "IncompleteResponse") || i == len(all) && err != nil {
			t.Errorf("%s: %v", some, err)
		}
	}
}

func TestExportOmitsExpiredCredentials(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := new(fakeSTS)
		c := running(t, sts, Config{})
		c.Hold("pod", assumption("a"))
		synctest.Wait()
		sts.set(func(s *fakeSTS) { s.err = &Error{Kind: Unavailable} })
		time.Sleep(time.Hour + time.Second)
		if exported, err := c.Export(); err != nil || string(exported) != "[]" {
			t.Errorf("%d bytes, %v", len(exported), err)
		}
	})
}
