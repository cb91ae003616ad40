package ratelimit

import (
	"testing"
	"time"

	"golang.org/x/time/rate"
)

func TestEachKeyHasItsOwnBucket(t *testing.T) {
	k, now := NewKeyed[string](10, 3), time.Now()
	allowed := func(key string, at time.Time, want int) {
		t.Helper()
		got := 0
		for range 100 {
			if k.Allow(key, at) {
				got++
			}
		}
		if got != want {
			t.Errorf("%s: %d allowed, want %d", key, got, want)
		}
	}
	allowed("a", now, 3)
	allowed("b", now, 3)
	allowed("a", now.Add(100*time.Millisecond), 1)
	allowed("a", now.Add(time.Minute), 3)
}

// TestReserve checks that callers wait in order, and that a refused caller takes no token.
func TestReserve(t *testing.T) {
	k, now := NewKeyed[string](10, 1), time.Now()
	for i := range 6 {
		wait, ok := k.Reserve("a", now, 500*time.Millisecond)
		if want := time.Duration(i) * 100 * time.Millisecond; !ok || wait.Round(time.Millisecond) != want {
			t.Errorf("%d: %v, %v; want %v", i, wait, ok, want)
		}
	}
	for range 1000 {
		if wait, ok := k.Reserve("a", now, 500*time.Millisecond); ok || wait != 500*time.Millisecond {
			t.Fatalf("one too many: %v, %v", wait, ok)
		}
	}
	if wait, ok := k.Reserve("a", now.Add(200*time.Millisecond), 500*time.Millisecond); !ok || wait.Round(time.Millisecond) != 400*time.Millisecond {
		t.Errorf("200 ms later: %v, %v", wait, ok)
	}
}

func TestInfAllowsEverything(t *testing.T) {
	k, now := NewKeyed[string](rate.Inf, 0), time.Now()
	for range 1000 {
		if !k.Allow("a", now) {
			t.Fatal("refused")
		}
	}
}

// TestKeysAreBounded uses more keys than are remembered. Full buckets are evicted first.
func TestKeysAreBounded(t *testing.T) {
	k, now := NewKeyed[int](10, 50), time.Now()
	for key := range 10 * MaxKeys {
		if k.Allow(key, now); len(k.buckets) > MaxKeys {
			t.Fatalf("%d remembered", len(k.buckets))
		}
	}
	k = NewKeyed[int](10, 50)
	for key := range MaxKeys {
		k.Allow(key, now)
	}
	for range 50 {
		k.Allow(0, now)
	}
	k.Allow(MaxKeys, now.Add(time.Second))
	if len(k.buckets) != 2 || k.Allow(0, now) {
		t.Errorf("%d remembered", len(k.buckets))
	}
}
