package main

import (
	"context"
	"os"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

// The proxy is idle most of the time, but its pods can send ten thousand requests a second. Early
// garbage collection keeps an idle proxy small, late collection keeps a busy one fast: with
// idlePercent, a busy proxy answers 0.1 to 0.2 fewer cached requests for each of net/http's (make
// bench PART=cached).
const (
	idlePercent, busyPercent = 25, 300 // GOGC
	// busyRate is the allocation rate of some thousand requests a second, in bytes a second.
	busyRate = 4 << 20
	// Below idleRate, memory is returned to the system once every returnInterval.
	idleRate, returnInterval = 64 << 10, time.Minute
	// tuneInterval is the time between two measurements of the rate.
	tuneInterval = 5 * time.Second
	// memoryLimit is the soft memory limit in bytes. It bounds a busy proxy whose clients hold many
	// connections. The pages of the program, some 12 MiB, are not part of it.
	memoryLimit = 32 << 20
)

// tuneGC sets GOGC by the allocation rate, and the memory limit, until ctx ends. It does not change
// what the operator has set by GOGC and GOMEMLIMIT.
func tuneGC(ctx context.Context) error {
	if os.Getenv("GOGC") != "" {
		return nil
	}
	debug.SetGCPercent(idlePercent)
	limit := func() {}
	if os.Getenv("GOMEMLIMIT") == "" {
		limit = setMemoryLimit
	}
	limit()
	tick := time.NewTicker(tuneInterval)
	defer tick.Stop()
	busy, before := false, allocatedBytes()
	var returned time.Time // when memory was last returned to the system
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		limit()
		now := allocatedBytes()
		switch rate := float64(now-before) / tuneInterval.Seconds(); {
		case busy && rate < busyRate/2:
			busy = false
			debug.SetGCPercent(idlePercent)
		case !busy && rate > busyRate:
			busy = true
			debug.SetGCPercent(busyPercent)
		case !busy && rate < idleRate && time.Since(returned) >= returnInterval:
			debug.FreeOSMemory()
			returned = time.Now()
		}
		before = now
	}
}

// setMemoryLimit sets the soft memory limit to memoryLimit, or to the size of an idle proxy if that
// is larger: below it, the runtime would collect garbage without pause.
func setMemoryLimit() {
	samples := []metrics.Sample{
		{Name: "/gc/heap/live:bytes"}, {Name: "/memory/classes/total:bytes"},
		{Name: "/memory/classes/heap/objects:bytes"}, {Name: "/memory/classes/heap/unused:bytes"},
		{Name: "/memory/classes/heap/free:bytes"}, {Name: "/memory/classes/heap/released:bytes"},
	}
	metrics.Read(samples)
	live, other := samples[0].Value.Uint64(), samples[1].Value.Uint64()
	for _, heap := range samples[2:] {
		other -= min(other, heap.Value.Uint64())
	}
	debug.SetMemoryLimit(max(memoryLimit, int64(live+live*idlePercent/100+other)))
}

// allocatedBytes returns the number of bytes that the process has allocated since its start.
func allocatedBytes() uint64 {
	sample := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(sample)
	return sample[0].Value.Uint64()
}
