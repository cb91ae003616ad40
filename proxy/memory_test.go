package main

import (
	"context"
	"runtime"
	"runtime/debug"
	"testing"
	"testing/synctest"
	"time"
)

var garbage []byte

// percent is how late garbage is collected now.
func percent() int {
	p := debug.SetGCPercent(100)
	debug.SetGCPercent(p)
	return p
}

func TestRestingProxyCollectsEarlyAndABusyOneLate(t *testing.T) {
	t.Setenv("GOGC", "")
	defer debug.SetGCPercent(debug.SetGCPercent(100))
	defer debug.SetMemoryLimit(debug.SetMemoryLimit(-1))
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go tuneGC(ctx)
		wants := func(when string, want int) {
			t.Helper()
			synctest.Wait()
			if got := percent(); got != want {
				t.Errorf("%s: %d percent, want %d", when, got, want)
			}
		}
		wants("at the start", idlePercent)
		// The other look at the same time as a sleep ends: it has to have its look before more is made.
		makes := func(n int) {
			garbage = make([]byte, n*int(tuneInterval.Seconds()))
			time.Sleep(tuneInterval)
			synctest.Wait()
		}
		makes(2 * busyRate)
		wants("busy", busyPercent)
		makes(busyRate * 3 / 4)
		wants("less so", busyPercent)
		time.Sleep(2 * tuneInterval)
		wants("at rest again", idlePercent)
	})
}

// TestMemoryLimitFollowsWhatLives holds that the limit is never below what a resting proxy takes: the runtime would collect without an end.
func TestMemoryLimitFollowsWhatLives(t *testing.T) {
	before := debug.SetMemoryLimit(-1)
	defer debug.SetMemoryLimit(before)
	runtime.GC()
	setMemoryLimit()
	if got := debug.SetMemoryLimit(-1); got < memoryLimit {
		t.Errorf("at rest: %d", got)
	}
	lives := make([]byte, 2*memoryLimit)
	runtime.GC()
	setMemoryLimit()
	if got := debug.SetMemoryLimit(-1); got < int64(len(lives))*5/4 || got > 8*memoryLimit {
		t.Errorf("with %d bytes that live: %d", len(lives), got)
	}
	runtime.KeepAlive(lives)
}

func TestGOGCIsTheOperatorsChoice(t *testing.T) {
	t.Setenv("GOGC", "75")
	before := percent()
	if err := tuneGC(t.Context()); err != nil || percent() != before {
		t.Errorf("%v, %d percent, want %d", err, percent(), before)
	}
}
