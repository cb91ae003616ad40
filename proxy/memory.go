package main

import (
	"context"
	"os"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

// A proxy has little that lives for long, and rests most of the time; but its pods may ask it ten thousand times a second, and each
// request makes garbage. Collecting early keeps a resting one small, and collecting late keeps a busy one fast: half of the
// collections were a tenth of the cached documents a second.
const (
	restingPercent, busyPercent = 50, 300
	// busyRate, in bytes allocated a second, is that of some thousand requests.
	busyRate = 4 << 20
	// memoryCheck is how often that is looked at.
	memoryCheck = 5 * time.Second
)

// keepSmall sets how early garbage is collected by how much of it is made, until ctx ends. GOGC in the environment is the operator's
// own choice.
func keepSmall(ctx context.Context) error {
	if os.Getenv("GOGC") != "" {
		return nil
	}
	debug.SetGCPercent(busyPercent) // a start is busy
	tick := time.NewTicker(memoryCheck)
	defer tick.Stop()
	busy, before := true, allocated()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		now := allocated()
		switch rate := float64(now-before) / memoryCheck.Seconds(); {
		case busy && rate < busyRate/2:
			busy = false
			debug.SetGCPercent(restingPercent)
			debug.FreeOSMemory()
		case !busy && rate > busyRate:
			busy = true
			debug.SetGCPercent(busyPercent)
		}
		before = now
	}
}

// allocated is how many bytes the process has allocated in all its life.
func allocated() uint64 {
	sample := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(sample)
	return sample[0].Value.Uint64()
}
