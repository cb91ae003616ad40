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
