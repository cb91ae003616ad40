package agent

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/filelock"
)

var (
	firstAgent  = Info{PID: 1 << 30, Args: []string{"kube2iam-cni", "agent", "--install"}, Flags: map[string]string{"install": "true"}, MountNS: 7, StateDir: "/run/a"}
	secondAgent = Info{PID: 1<<30 + 1, Args: []string{"kube2iam-cni", "agent"}, StateDir: "/run/b"}
)

// wantLocked takes the lock, which is free.
func wantLocked(t *testing.T, path string, info Info) *Lock {
	t.Helper()
	l, err := tryLock(t.Context(), path, info)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Unlock)
	return l
}

func wantReady(t *testing.T, when, path string, want bool, status string) {
	t.Helper()
	info, err := readInfo(path)
	if err != nil || info.IsReady != want || info.Status != status {
		t.Errorf("%s: ready %v, status %q, error %v; want %v and %q", when, info.IsReady, info.Status, err, want, status)
	}
}

func TestAgentIsReadyForAsLongAsItSaysSoAndHasTheLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	none := func(when string) {
		t.Helper()
		if _, err := readInfo(path); !errors.Is(err, ErrNotRunning) {
			t.Errorf("%s: %v", when, err)
		}
	}
	none("no agent was ever here")
	l := wantLocked(t, path, firstAgent)
	wantReady(t, "at its start", path, false, "")
	for range 2 {
		if err := l.SetStatus(true, "all in place"); err != nil {
			t.Fatal(err)
		}
		wantReady(t, "when it says so", path, true, "all in place")
	}
	if err := l.SetStatus(false, "gone"); err != nil {
		t.Fatal(err)
	}
	wantReady(t, "when it takes that back", path, false, "gone")
	if err := l.SetStatus(true, "all in place"); err != nil {
		t.Fatal(err)
	}
	if info, err := readInfo(path); err != nil || info.String() != "PID 1073741824 (kube2iam-cni agent --install), state directory /run/a" || info.Flags["install"] != "true" || info.MountNS != 7 {
		t.Errorf("it describes itself as %+v, %v", info, err)
	}
	// A process that dies closes the file, and removes nothing.
	l.file.Close()
	none("when it died")
	if _, err := os.Stat(path); err != nil {
		t.Fatal(err)
	}
	second := wantLocked(t, path, secondAgent)
	wantReady(t, "its successor", path, false, "")
	second.Unlock()
	none("when its successor ended")
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the file stays: %v", err)
	}
	if err := second.SetStatus(true, "late"); err != nil {
		t.Error(err)
	}
	none("when a round ended late")
}

func TestSecondAgentWaitsAndSaysForWhichOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "lock")
		first := wantLocked(t, path, firstAgent)
		var named []int
		got := make(chan *Lock, 1)
		go func() {
			l, err := waitForLock(t.Context(), path, secondAgent, func(holder Info) { named = append(named, holder.PID) })
			if err != nil {
				t.Error(err)
			}
			got <- l
		}()
		time.Sleep(2*reminderInterval + time.Minute)
		synctest.Wait()
		if len(named) != 3 || named[0] != firstAgent.PID || len(got) > 0 {
			t.Errorf("after 21 minutes it named %v, and has the lock: %v", named, len(got) > 0)
		}
		first.Unlock()
		time.Sleep(maxLockPoll)
		synctest.Wait()
		select {
		case l := <-got:
			l.Unlock()
		default:
			t.Error("it waits, although the first has ended")
		}
	})
}

func TestInterruptedWaitEndsAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "lock")
		wantLocked(t, path, firstAgent)
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Minute, cancel)
		start := time.Now()
		if _, err := waitForLock(ctx, path, secondAgent, func(Info) {}); !errors.Is(err, context.Canceled) || time.Since(start) != time.Minute {
			t.Errorf("%v after %v", err, time.Since(start))
		}
		start = time.Now()
		_, err := tryLock(t.Context(), path, secondAgent)
		if !errors.Is(err, ErrRunning) || !strings.Contains(err.Error(), firstAgent.String()) || time.Since(start) != lockWait {
			t.Errorf("one that does not wait: %v after %v", err, time.Since(start))
		}
		wantReady(t, "the first, after them", path, false, "")
	})
}

// TestAgentLockOutlivesItsFile has an administrator remove the file while an agent runs.
func TestAgentLockOutlivesItsFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	l := wantLocked(t, path, firstAgent)
	if err := errors.Join(l.SetStatus(true, "all"), os.Remove(path), l.SetStatus(true, "all")); err != nil {
		t.Fatal(err)
	}
	wantReady(t, "after its next round", path, true, "all")
	if _, err := tryLock(t.Context(), path, secondAgent); !errors.Is(err, ErrRunning) {
		t.Errorf("another one is let in: %v", err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	wantLocked(t, path, secondAgent)
	if err := l.SetStatus(true, "all"); err == nil || !strings.Contains(err.Error(), "PID 1073741825") {
		t.Errorf("the first goes on beside the second: %v", err)
	}
	l.Unlock()
	wantReady(t, "the second, after the first has ended", path, false, "")
}

// TestAgentLockPassesToTheNext has every holder remove the file that the others wait for.
func TestAgentLockPassesToTheNext(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	const agents = 8
	inside := make(chan struct{}, 1)
	done := make(chan error)
	for range agents {
		go func() {
			l, err := waitForLock(t.Context(), path, firstAgent, func(Info) {})
			if err == nil {
				select {
				case inside <- struct{}{}:
					<-inside
				default:
					err = errors.New("two have the lock")
				}
				l.Unlock()
			}
			done <- err
		}()
	}
	for range agents {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func TestDescriptionOfAnAgentIsBoundedAndPrintable(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	l := wantLocked(t, path, firstAgent)
	hostile := strings.Repeat("\x1b[2J\n", 1000)
	text, err := json.Marshal(Info{PID: 1 << 30, Args: []string{hostile}, StateDir: hostile, Status: hostile})
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string][]byte{"hostile": text, "no JSON": []byte("x"), "nothing": nil, "too long": append([]byte(`{"pid":1,"args":["`), make([]byte, 2*maxInfo)...)} {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := filelock.TryLock(l.file, readyByte, filelock.Exclusive); err != nil {
			t.Fatal(err)
		}
		info, err := readInfo(path)
		shown := info.String() + info.Status
		if err != nil || len(shown) > 4*maxText || strings.ContainsAny(shown, "\x1b\n") || info.IsReady != (name == "hostile") {
			t.Errorf("%s: %.200q, %v", name, shown, err)
		}
	}
}
