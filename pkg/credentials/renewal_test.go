package credentials

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
)

func TestIMDS23HeldCredentialsAreRenewedInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := &fakeSTS{latency: 100 * time.Millisecond}
		c := running(t, sts, Config{})
		a := assumption("a")
		c.Hold("uid", a)
		time.Sleep(time.Second)
		const hours = 24
		for range hours * 60 {
			start := time.Now()
			d := mustGet(t, c, a)
			if left := time.Until(d.Expiration()); left < 1500*time.Second {
				t.Fatalf("%v left", left)
			}
			if waited := time.Since(start); waited != 0 {
				t.Fatalf("a request waited %v", waited)
			}
			time.Sleep(time.Minute)
		}
		if n := sts.count(); n > hours*24/10+1 {
			t.Errorf("%d calls in %d hours, more than 2.4 an hour", n, hours)
		}
	})
}

// TestOutageOf29MinutesCausesNoRefusal starts the outage at various times, also when all renewals
// are due or have just begun.
func TestOutageOf29MinutesCausesNoRefusal(t *testing.T) {
	for _, after := range []time.Duration{time.Second, 2 * time.Minute, 10 * time.Minute, 25 * time.Minute, 29*time.Minute + 59*time.Second, 30*time.Minute + time.Second, 200 * time.Minute} {
		t.Run(after.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				sts := new(fakeSTS)
				c := running(t, sts, Config{})
				for i := range 200 {
					c.Hold(fmt.Sprint(i), assumption(fmt.Sprint(i)))
				}
				time.Sleep(after)
				before := sts.count()
				sts.set(func(s *fakeSTS) { s.err = &Error{Kind: Unavailable, Code: "RequestError"}; s.latency = 5 * time.Second })
				least := time.Hour
				for outage := time.Now(); time.Since(outage) < 29*time.Minute; {
					for i := range 200 {
						d, err := c.Get(t.Context(), fmt.Sprint(i), assumption(fmt.Sprint(i)))
						if err != nil {
							t.Fatal(err)
						}
						left := time.Until(d.Expiration())
						if least = min(least, left); left <= 0 {
							t.Fatal("expired credentials")
						}
					}
					time.Sleep(10 * time.Second)
				}
				if after >= 25*time.Minute && (least > 15*time.Minute || sts.count() < before+200) {
					t.Errorf("credentials had at least %v left, %d calls during the outage: the outage had no effect", least, sts.count()-before)
				}
				sts.set(func(s *fakeSTS) { s.err, s.latency = nil, 0 })
				time.Sleep(3 * time.Minute)
				for i := range 200 {
					if left := time.Until(mustGet(t, c, assumption(fmt.Sprint(i))).Expiration()); left < 1500*time.Second {
						t.Fatalf("three minutes after the outage: %v left", left)
					}
				}
			})
		})
	}
}

// TestLatestExpirationIsServed checks that a renewal does not replace credentials that expire
// later.
func TestLatestExpirationIsServed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := new(fakeSTS)
		c := running(t, sts, Config{})
		a := assumption("a")
		c.Hold("pod", a)
		synctest.Wait()
		first := mustGet(t, c, a)
		sts.set(func(s *fakeSTS) { s.lifetime = 15 * time.Minute })
		for sts.count() == 1 {
			time.Sleep(time.Minute)
		}
		if left := time.Until(first.Expiration()); left > 15*time.Minute && mustGet(t, c, a) != first {
			t.Errorf("credentials with %v left were replaced by ones that expire earlier", left)
		}
		time.Sleep(time.Until(first.Expiration()) - 10*time.Minute)
		if mustGet(t, c, a) == first {
			t.Error("credentials were not replaced by ones that expire later")
		}
	})
}

// TestValidCredentialsAreServedDuringSlowRenewal lets requests start a renewal while STS is slow.
func TestValidCredentialsAreServedDuringSlowRenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := new(fakeSTS)
		c := running(t, sts, Config{})
		a := assumption("a")
		c.Hold("pod", a)
		synctest.Wait()
		first := mustGet(t, c, a)
		sts.set(func(s *fakeSTS) { s.latency = 10 * time.Second; s.err = errors.New("down") })
		time.Sleep(50 * time.Minute)
		for range 100 {
			start := time.Now()
			if mustGet(t, c, a) != first {
				t.Fatal("other credentials were served")
			}
			if waited := time.Since(start); waited > 200*time.Millisecond {
				t.Fatalf("a request waited %v although valid credentials were cached", waited)
			}
			time.Sleep(time.Second)
		}
		sts.set(func(s *fakeSTS) { s.latency, s.err = 100*time.Millisecond, nil })
		time.Sleep(time.Minute)
		if mustGet(t, c, a) == first {
			t.Error("not renewed")
		}
	})
}

func TestExpiredCredentialsAreNeverServed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := &fakeSTS{}
		c := running(t, sts, Config{})
		a := assumption("a")
		c.Hold("uid", a)
		time.Sleep(time.Second)
		sts.set(func(s *fakeSTS) { s.err = errors.New("down") })
		time.Sleep(time.Hour)
		if d, err := c.Get(t.Context(), "pod", a); err == nil {
			t.Errorf("%v", d)
		}
		sts.set(func(s *fakeSTS) { s.err = nil })
		time.Sleep(3 * time.Minute)
		mustGet(t, c, a)
	})
}

func TestShortSessionsScaleDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := &fakeSTS{lifetime: 15 * time.Minute} // instead of the requested duration
		c := running(t, sts, Config{})
		a := assumption("a")
		c.Hold("uid", a)
		for range 240 {
			time.Sleep(time.Minute)
			if left := time.Until(mustGet(t, c, a).Expiration()); left < 375*time.Second {
				t.Fatalf("%v left of 15 minutes", left)
			}
		}
		if n := sts.count(); n < 24 || n > 45 {
			t.Errorf("%d calls in four hours of sessions of 15 minutes", n)
		}
	})
}

// TestExpiredNewCredentialsMeanClockSkew lets STS issue credentials that have expired by the node's
// clock.
func TestExpiredNewCredentialsMeanClockSkew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		failed := make(chan *Error, 1)
		c := running(t, &fakeSTS{lifetime: -time.Minute}, Config{Failed: func(_ string, _ roles.Assumption, err *Error) { failed <- err }})
		c.Hold("pod", assumption("a"))
		d, err := c.Get(t.Context(), "pod", assumption("a"))
		if e, ok := errors.AsType[*Error](err); !ok || d != nil || e.Kind != ClockSkew || e.Code != "ExpiredCredentials" || !strings.Contains(e.Cause, "have already ended") {
			t.Errorf("%v, %v", d, err)
		}
		if e := <-failed; e.Kind != ClockSkew {
			t.Errorf("reported to its holder: %v", e)
		}
	})
}
