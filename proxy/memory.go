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
	restingPercent, busyPercent = 25, 300
	// busyRate, in bytes allocated a second, is that of some thousand requests.
	busyRate = 4 << 20
	// Below restingRate nobody asks for much, and a collection, some milliseconds, is worth its while once a minute.
	restingRate, returnEvery = 64 << 10, time.Minute
	// memoryCheck is how often that is looked at.
	memoryCheck = 5 * time.Second
)

// keepSmall sets how early garbage is collected by how much of it is made, and gives the system back what a busy time took, until ctx
// ends. GOGC in the environment is the operator's own choice.
func keepSmall(ctx context.Context) error {
	if os.Getenv("GOGC") != "" {
		return nil
	}
	debug.SetGCPercent(restingPercent) // what lives for long is made at the start: it lies closer together when there is little garbage between
	limit := func() {}
	if os.Getenv("GOMEMLIMIT") == "" {
		limit = limitMemory
	}
	limit()
	tick := time.NewTicker(memoryCheck)
	defer tick.Stop()
	busy, before := false, allocated()
	var returned time.Time // when memory was given back
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		limit()
		now := allocated()
		switch rate := float64(now-before) / memoryCheck.Seconds(); {
		case busy && rate < busyRate/2:
			busy = false
			debug.SetGCPercent(restingPercent)
		case !busy && rate > busyRate:
			busy = true
			debug.SetGCPercent(busyPercent)
		case !busy && rate < restingRate && time.Since(returned) >= returnEvery:
			debug.FreeOSMemory()
			returned = time.Now()
		}
		before = now
	}
}

// memoryLimit is what the Go runtime may take before it collects earlier than busyPercent asks for: pods that hold all connections and make
// garbage on them would make a busy proxy several times as large. The program's pages come on top, some 12 MiB.
const memoryLimit = 32 << 20

// limitMemory sets the runtime's soft limit to memoryLimit, or to what a resting proxy takes where that is more: a lower one would have the
// runtime collect all the time.
func limitMemory() {
	samples := []metrics.Sample{
		{Name: "/gc/heap/live:bytes"}, {Name: "/memory/classes/total:bytes"},
		{Name: "/memory/classes/heap/objects:bytes"}, {Name: "/memory/classes/heap/unused:bytes"},
		{Name: "/memory/classes/heap/free:bytes"}, {Name: "/memory/classes/heap/released:bytes"},
	}
	metrics.Read(samples)
	live, besides := samples[0].Value.Uint64(), samples[1].Value.Uint64()
	for _, heap := range samples[2:] {
		besides -= min(besides, heap.Value.Uint64())
	}
	debug.SetMemoryLimit(max(memoryLimit, int64(live+live*restingPercent/100+besides)))
}

// allocated is how many bytes the process has allocated in all its life.
func allocated() uint64 {
	sample := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(sample)
	return sample[0].Value.Uint64()
}
