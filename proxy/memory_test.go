package main

import (
	"context"
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
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go keepSmall(ctx)
		wants := func(when string, want int) {
			t.Helper()
			synctest.Wait()
			if got := percent(); got != want {
				t.Errorf("%s: %d percent, want %d", when, got, want)
			}
		}
		wants("at the start", restingPercent)
		// The other look at the same time as a sleep ends: it has to have its look before more is made.
		makes := func(n int) {
			garbage = make([]byte, n*int(memoryCheck.Seconds()))
			time.Sleep(memoryCheck)
			synctest.Wait()
		}
		makes(2 * busyRate)
		wants("busy", busyPercent)
		makes(busyRate * 3 / 4)
		wants("less so", busyPercent)
		time.Sleep(2 * memoryCheck)
		wants("at rest again", restingPercent)
	})
}

func TestGOGCIsTheOperatorsChoice(t *testing.T) {
	t.Setenv("GOGC", "75")
	before := percent()
	if err := keepSmall(t.Context()); err != nil || percent() != before {
		t.Errorf("%v, %d percent, want %d", err, percent(), before)
	}
}
