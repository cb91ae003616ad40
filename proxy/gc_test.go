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

// percent returns the current GOGC.
func percent() int {
	p := debug.SetGCPercent(100)
	debug.SetGCPercent(p)
	return p
}

func TestIdleProxyCollectsEarlyAndABusyOneLate(t *testing.T) {
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
		// allocate allocates at a rate, and lets tuneGC measure it before more is allocated.
		allocate := func(n int) {
			garbage = make([]byte, n*int(tuneInterval.Seconds()))
			time.Sleep(tuneInterval)
			synctest.Wait()
		}
		allocate(2 * busyRate)
		wants("busy", busyPercent)
		allocate(busyRate * 3 / 4)
		wants("less busy", busyPercent)
		time.Sleep(2 * tuneInterval)
		wants("idle again", idlePercent)
	})
}

// TestMemoryLimitFollowsTheLiveHeap: the limit is never below the memory of an idle proxy, because the
// runtime would collect garbage without pause.
func TestMemoryLimitFollowsTheLiveHeap(t *testing.T) {
	before := debug.SetMemoryLimit(-1)
	defer debug.SetMemoryLimit(before)
	runtime.GC()
	setMemoryLimit()
	if got := debug.SetMemoryLimit(-1); got < memoryLimit {
		t.Errorf("idle: %d", got)
	}
	lives := make([]byte, 2*memoryLimit)
	runtime.GC()
	setMemoryLimit()
	if got := debug.SetMemoryLimit(-1); got < int64(len(lives))*5/4 || got > 8*memoryLimit {
		t.Errorf("with %d bytes of live heap: %d", len(lives), got)
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
