package node

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
)

func TestAgentIsReadyForAsLongAsItSaysSoAndRuns(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	log := slog.New(slog.DiscardHandler)
	wants := func(when string, want bool) {
		t.Helper()
		if got, err := IsReady(dir); err != nil || got != want {
			t.Errorf("%s: ready %v, %v", when, got, err)
		}
	}
	wants("no agent was ever here", false)
	first, err := Presence(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	wants("at its start", false)
	first.SetReady(true, log)
	first.SetReady(true, log)
	wants("when it says so", true)
	first.SetReady(false, log)
	wants("when it takes that back", false)
	first.SetReady(true, log)
	second, err := Presence(t.Context(), dir) // its successor
	if err != nil {
		t.Fatal(err)
	}
	second.SetReady(true, log)
	first.End()
	wants("when its successor says so", true)
	second.End()
	wants("when both have ended", false)
}

func TestUninstallAndAgentKeepEachOtherOff(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	ctx, cancel := context.WithCancel(t.Context())
	cancel() // nobody is waited for
	end, err := Absence(ctx, dir)
	if err != nil {
		t.Fatalf("where no agent was: %v", err)
	}
	end()
	agent, err := Presence(ctx, dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Absence(ctx, dir); !errors.Is(err, ErrAgent) {
		t.Errorf("while it runs: %v", err)
	}
	agent.End()
	if end, err = Absence(ctx, dir); err != nil {
		t.Fatalf("after it: %v", err)
	}
	if _, err := Presence(ctx, dir); err == nil {
		t.Error("an agent started in the middle of an uninstall")
	}
	end()
}

// TestAgentIsFoundAfterItsStateDirectoryWasRemoved has somebody remove it, and the next ADD make it anew.
func TestAgentIsFoundAfterItsStateDirectoryWasRemoved(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	log := slog.New(slog.DiscardHandler)
	agent, err := Presence(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	defer agent.End()
	agent.SetReady(true, log)
	if err := errors.Join(os.RemoveAll(dir), os.Mkdir(dir, 0o755)); err != nil {
		t.Fatal(err)
	}
	agent.SetReady(true, log) // its next round
	if ready, err := IsReady(dir); err != nil || !ready {
		t.Errorf("ready %v, %v", ready, err)
	}
	if _, err := Absence(t.Context(), dir); !errors.Is(err, ErrAgent) {
		t.Errorf("an uninstall is let in: %v", err)
	}
}

// TestAgentThatWaitsForAnUninstallIsFoundByTheNext has the first remove the lock that the agent waits for.
func TestAgentThatWaitsForAnUninstallIsFoundByTheNext(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	end, err := Absence(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	starts := make(chan struct{})
	agents := make(chan *Present)
	go func() {
		defer close(agents)
		close(starts)
		for { // as its container is started again
			if agent, err := Presence(context.Background(), dir); err == nil {
				agents <- agent
				return
			} else if !errors.Is(err, fs.ErrNotExist) {
				t.Error(err)
				return
			}
		}
	}()
	<-starts
	if err := removeAll(dir); err != nil {
		t.Fatal(err)
	}
	end()
	agent := <-agents
	if agent == nil {
		t.Fatal("no agent")
	}
	defer agent.End()
	if _, err := Absence(t.Context(), dir); !errors.Is(err, ErrAgent) {
		t.Errorf("an uninstall is let in: %v", err)
	}
}
