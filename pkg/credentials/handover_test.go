package credentials

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
)

func renewAt(c *Cache, a roles.Assumption) time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.entries[a].renewAt
}

func TestImportedCredentialsAreServed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first := new(fakeSTS)
		old := running(t, first, Config{})
		for i := range 10 {
			old.Hold(fmt.Sprint("pod-", i), assumption(fmt.Sprint("role-", i)))
		}
		mustGet(t, old, assumption("unheld"))
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
			if was, is := renewAt(old, a), renewAt(c, a); !was.Equal(is) {
				t.Errorf("%s is renewed at %v and not %v", a.RoleARN, is, was)
			}
		}
		if n := c.Stats().Pending; n != 0 {
			t.Errorf("%d are pending", n)
		}
		synctest.Wait()
		if n := second.count(); n != 0 {
			t.Errorf("%d calls", n)
		}
		for range 30 {
			time.Sleep(time.Minute)
			for i := range 10 {
				if left := time.Until(mustGet(t, c, assumption(fmt.Sprint("role-", i))).Expiration()); left < 1500*time.Second {
					t.Errorf("%v left", left)
				}
			}
		}
	})
}

func TestImportedCredentialsWithoutHolderAreRemoved(t *testing.T) {
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
		time.Sleep(importLifetime - time.Minute)
		if !has(c, assumption("a")) {
			t.Error("removed before the pods may be known")
		}
		time.Sleep(3 * time.Minute)
		if has(c, assumption("a")) {
			t.Error("kept without a holder")
		}
	})
}

func TestInvalidImport(t *testing.T) {
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
			t.Errorf("newer credentials were replaced: %d, %v", n, err)
		}
		for _, wrong := range []string{"", "{", `{"Assumption":1}`, `[{"Document":"secret"}]`, `[{"secret":1}]`, `[{"Assumption":{"TransitiveTags":"secret"}}]`, strings.Replace(string(exported), "[{", `["secret",{`, 1)} {
			n, err := running(t, new(fakeSTS), Config{}).Import([]byte(wrong))
			if err == nil || n != 0 || strings.Contains(err.Error(), "secret") {
				t.Errorf("%q: %d, %v", wrong, n, err)
			}
		}
		now := time.Now()
		for name, h := range map[string]exportedEntry{
			"no session":            {Document: []byte("{}"), Expiration: now.Add(time.Minute)},
			"longer than a session": {Assumption: a, Document: []byte("{}"), Expiration: now.Add(a.Duration + 2*time.Minute)},
			"no JSON":               {Assumption: a, Document: []byte("{"), Expiration: now.Add(time.Minute)},
		} {
			one, err := json.Marshal([]exportedEntry{h})
			if err != nil {
				t.Fatal(err)
			}
			if n, err := running(t, new(fakeSTS), Config{}).Import(one); err != nil || n != 0 {
				t.Errorf("%s: %d, %v", name, n, err)
			}
		}
		time.Sleep(time.Hour)
		if n, err := running(t, new(fakeSTS), Config{}).Import(exported); err != nil || n != 0 {
			t.Errorf("expired credentials: %d, %v", n, err)
		}
	})
}

// TestRepeatedImport imports again after the first import has been removed, while STS fails.
func TestRepeatedImport(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		old := running(t, new(fakeSTS), Config{})
		a := assumption("a")
		old.Hold("pod", a)
		synctest.Wait()
		was := mustGet(t, old, a)
		exported, err := old.Export()
		if err != nil {
			t.Fatal(err)
		}
		c := running(t, &fakeSTS{err: &Error{Kind: Unavailable}}, Config{})
		if _, err := c.Import(exported); err != nil {
			t.Fatal(err)
		}
		time.Sleep(importLifetime + 2*time.Minute)
		c.Hold("pod", a)
		synctest.Wait()
		if n, err := c.Import(exported); err != nil || n != 1 {
			t.Errorf("imported %d, %v", n, err)
		}
		if d := mustGet(t, c, a); string(d.Body()) != string(was.Body()) {
			t.Error("another document")
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

func TestDueImportIsRenewed(t *testing.T) {
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
