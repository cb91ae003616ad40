package credentials

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestSuccessorHasWhatPodsHoldWithoutAskingSTS(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first := new(fakeSTS)
		old := running(t, first, Config{})
		for i := range 10 {
			old.Hold(fmt.Sprint("pod-", i), assumption(fmt.Sprint("role-", i)))
		}
		mustGet(t, old, assumption("nobody's"))
		synctest.Wait()
		time.Sleep(20 * time.Minute)
		exported, err := old.Export()
		if err != nil {
			t.Fatal(err)
		}
		second := new(fakeSTS)
		c := running(t, second, Config{})
		if n, err := c.Import(exported); err != nil || n != 10 {
			t.Fatalf("imported %d, %v", n, err)
		}
		for i := range 10 {
			a := assumption(fmt.Sprint("role-", i))
			c.Hold(fmt.Sprint("pod-", i), a)
			if was, is := mustGet(t, old, a), mustGet(t, c, a); !bytes.Equal(was.Body(), is.Body()) || was.LastModified()[0] != is.LastModified()[0] || !was.Expiration().Equal(is.Expiration()) {
				t.Errorf("%s differs", a.RoleARN)
			}
		}
		if n := c.Pending(); n != 0 {
			t.Errorf("%d are pending", n)
		}
		synctest.Wait()
		if n := second.count(); n != 0 {
			t.Errorf("STS was asked %d times", n)
		}
		// They are renewed as they would have been.
		for range 30 {
			time.Sleep(time.Minute)
			for i := range 10 {
				if left := time.Until(mustGet(t, c, assumption(fmt.Sprint("role-", i))).Expiration()); left < 1500*time.Second {
					t.Errorf("%v left", left)
				}
			}
		}
		if n := second.count(); n != 10 {
			t.Errorf("STS was asked %d times for ten renewals", n)
		}
	})
}

func TestSuccessorForgetsWhatNoPodHolds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		old := running(t, new(fakeSTS), Config{})
		old.Hold("pod", assumption("a"))
		synctest.Wait()
		exported, err := old.Export()
		if err != nil {
			t.Fatal(err)
		}
		c := running(t, new(fakeSTS), Config{})
		if n, err := c.Import(exported); err != nil || n != 1 {
			t.Fatalf("imported %d, %v", n, err)
		}
		time.Sleep(3 * unheld)
		if has(c, assumption("a")) {
			t.Error("it is there after minutes")
		}
	})
}

func TestImportTakesNothingThatIsWrong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		old := running(t, new(fakeSTS), Config{})
		a := assumption("a")
		old.Hold("pod", a)
		synctest.Wait()
		exported, err := old.Export()
		if err != nil {
			t.Fatal(err)
		}
		c := running(t, new(fakeSTS), Config{})
		newest := mustGet(t, c, a)
		if n, err := c.Import(exported); err != nil || n != 0 || mustGet(t, c, a) != newest {
			t.Errorf("what was there gave way: %d, %v", n, err)
		}
		for _, wrong := range []string{"", "{", `{"Assumption":1}`, `[{"Document":"secret"}]`, strings.Replace(string(exported), "[{", `["secret",{`, 1)} {
			n, err := running(t, new(fakeSTS), Config{}).Import([]byte(wrong))
			if err == nil || n != 0 || strings.Contains(err.Error(), "secret") {
				t.Errorf("%q: %d, %v", wrong, n, err)
			}
		}
		time.Sleep(time.Hour)
		if n, err := running(t, new(fakeSTS), Config{}).Import(exported); err != nil || n != 0 {
			t.Errorf("what has ended: %d, %v", n, err)
		}
	})
}

// TestSuccessorTakesOverLate has the pods become known minutes after the first import, while STS is away.
func TestSuccessorTakesOverLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		old := running(t, new(fakeSTS), Config{})
		a := assumption("a")
		old.Hold("pod", a)
		synctest.Wait()
		exported, err := old.Export()
		if err != nil {
			t.Fatal(err)
		}
		c := running(t, &fakeSTS{err: &Error{Kind: Unavailable}}, Config{})
		if _, err := c.Import(exported); err != nil {
			t.Fatal(err)
		}
		time.Sleep(3 * unheld)
		c.Hold("pod", a)
		synctest.Wait()
		if n, err := c.Import(exported); err != nil || n != 1 {
			t.Errorf("imported %d, %v", n, err)
		}
		if d := mustGet(t, c, a); string(d.Body()) != string(mustGet(t, old, a).Body()) {
			t.Error("it is another document")
		}
	})
}

// TestPodThatChangesItsMindHasNobodyAskSTS holds one assumption after the other, faster than STS answers.
func TestPodThatChangesItsMindHasNobodyAskSTS(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sts := &fakeSTS{latency: time.Second}
		c := running(t, sts, Config{})
		for i := range 1000 {
			c.Hold("pod", assumption(fmt.Sprint("role-", i)))
		}
		c.Hold("neighbour", assumption("other"))
		time.Sleep(3 * time.Second)
		if !has(c, assumption("other")) {
			t.Error("the neighbour waits behind calls for nobody")
		}
		if n := sts.count(); n > 2*background+2 {
			t.Errorf("STS was asked %d times for two pods", n)
		}
		c.mu.Lock()
		entries := len(c.entries)
		c.mu.Unlock()
		if entries > 2 {
			t.Errorf("%d entries for two pods", entries)
		}
	})
}
