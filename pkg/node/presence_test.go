package node

import (
	"context"
	"errors"
	"log/slog"
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
