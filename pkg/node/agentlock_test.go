package node

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
)

var (
	firstAgent  = AgentInfo{PID: 1 << 30, Args: []string{"kube2iam-agent", "run", "--install"}, Flags: map[string]string{"install": "true"}, MountNS: 7, StateDir: "/run/a"}
	secondAgent = AgentInfo{PID: 1<<30 + 1, Args: []string{"kube2iam-agent", "run"}, StateDir: "/run/b"}
)

// wantLocked takes the lock, which nobody has.
func wantLocked(t *testing.T, path string, info AgentInfo) *AgentLock {
	t.Helper()
	l, err := tryLockAgent(t.Context(), path, info)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Unlock)
	return l
}

func wantReady(t *testing.T, when, path string, want bool, status string) {
	t.Helper()
	info, err := readAgentInfo(path)
	if err != nil || info.Ready != want || info.Status != status {
		t.Errorf("%s: ready %v, status %q, error %v; want %v and %q", when, info.Ready, info.Status, err, want, status)
	}
}

func TestAgentIsReadyForAsLongAsItSaysSoAndHasTheLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	none := func(when string) {
		t.Helper()
		if _, err := readAgentInfo(path); !errors.Is(err, ErrNoAgent) {
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
	if info, err := readAgentInfo(path); err != nil || info.String() != "PID 1073741824 (kube2iam-agent run --install), state directory /run/a" || info.Flags["install"] != "true" || info.MountNS != 7 {
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
		var said []int
		got := make(chan *AgentLock, 1)
		go func() {
			l, err := lockAgent(t.Context(), path, secondAgent, func(holder AgentInfo) { said = append(said, holder.PID) })
			if err != nil {
				t.Error(err)
			}
			got <- l
		}()
		time.Sleep(2*agentReminder + time.Minute)
		synctest.Wait()
		if len(said) != 3 || said[0] != firstAgent.PID || len(got) > 0 {
			t.Errorf("after 21 minutes it named %v, and has the lock: %v", said, len(got) > 0)
		}
		first.Unlock()
		time.Sleep(agentPoll)
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
		if _, err := lockAgent(ctx, path, secondAgent, func(AgentInfo) {}); !errors.Is(err, context.Canceled) || time.Since(start) != time.Minute {
			t.Errorf("%v after %v", err, time.Since(start))
		}
		start = time.Now()
		_, err := tryLockAgent(t.Context(), path, secondAgent)
		if !errors.Is(err, ErrAgent) || !strings.Contains(err.Error(), firstAgent.String()) || time.Since(start) != agentEnd {
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
	if _, err := tryLockAgent(t.Context(), path, secondAgent); !errors.Is(err, ErrAgent) {
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

// TestLockOfARemovedFileCountsForNothing has the holder end, and remove the file, between another process's open and its lock.
func TestLockOfARemovedFileCountsForNothing(t *testing.T) {
	for name, then := range map[string]func(path string){
		"nobody else comes":    func(string) {},
		"another one locks it": func(path string) { wantLocked(t, path, secondAgent) },
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "lock")
			first := wantLocked(t, path, firstAgent)
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if err := lockFile(path, f); !errors.Is(err, ErrAgent) {
				t.Errorf("while it is held: %v, want %v", err, ErrAgent)
			}
			first.Unlock()
			then(path)
			if err := lockFile(path, f); !errors.Is(err, errUnlinked) {
				t.Errorf("when it was removed: %v, want %v", err, errUnlinked)
			}
		})
	}
}

// TestAgentLockIsHandedOn has every holder remove the file that the others wait for.
func TestAgentLockIsHandedOn(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	const agents = 8
	inside := make(chan struct{}, 1)
	done := make(chan error)
	for range agents {
		go func() {
			l, err := lockAgent(t.Context(), path, firstAgent, func(AgentInfo) {})
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
	text, err := json.Marshal(AgentInfo{PID: 1 << 30, Args: []string{hostile}, StateDir: hostile, Status: hostile})
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string][]byte{"hostile": text, "no JSON": []byte("x"), "nothing": nil, "too long": append([]byte(`{"pid":1,"args":["`), make([]byte, 2*maxAgentInfo)...)} {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := lockByte(l.file, readyByte, 1); err != nil {
			t.Fatal(err)
		}
		info, err := readAgentInfo(path)
		shown := info.String() + info.Status
		if err != nil || len(shown) > 4*maxShown || strings.ContainsAny(shown, "\x1b\n") || info.Ready != (name == "hostile") {
			t.Errorf("%s: %.200q, %v", name, shown, err)
		}
	}
}
