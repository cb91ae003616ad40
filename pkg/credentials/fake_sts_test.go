package credentials

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
)

// fakeSTS counts calls. Its credentials are numbered, so a test sees which call issued them.
type fakeSTS struct {
	mu       sync.Mutex
	calls    map[roles.Assumption]int
	total    int
	flying   int
	peak     int
	latency  time.Duration
	lifetime time.Duration // zero for the requested duration
	err      error
	refuse   func(roles.Assumption) error
}

func (s *fakeSTS) AssumeRole(ctx context.Context, a roles.Assumption) (*Credentials, error) {
	s.mu.Lock()
	if s.calls == nil {
		s.calls = make(map[roles.Assumption]int)
	}
	s.calls[a]++
	s.total++
	s.flying++
	s.peak = max(s.peak, s.flying)
	n, latency, err, refuse, lifetime := s.total, s.latency, s.err, s.refuse, s.lifetime
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		s.flying--
		s.mu.Unlock()
	}()
	if latency > 0 { // a timer that is due at once can crash Go's race detector in a synctest bubble
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(latency):
		}
	}
	if err == nil && refuse != nil {
		err = refuse(a)
	}
	if err != nil {
		return nil, err
	}
	if lifetime == 0 {
		lifetime = a.Duration
	}
	return &Credentials{
		AccessKeyID: fmt.Sprintf("ASIA%d", n), SecretAccessKey: "secret", SessionToken: "session",
		Obtained: time.Now(), Expiration: time.Now().Add(lifetime),
	}, nil
}

func (s *fakeSTS) set(change func(*fakeSTS)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(s)
}

func (s *fakeSTS) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.total
}

func assumption(role string) roles.Assumption {
	return roles.Assumption{RoleARN: "arn:aws:iam::123456789012:role/" + role, SessionName: "ns.pod", Duration: time.Hour}
}

type discardObserver struct{}

func (discardObserver) Assumed(string, time.Duration) {}

func (discardObserver) Requested(bool) {}

// newCache returns a cache whose Run the test starts. The fields of c are optional.
func newCache(sts Assumer, c Config) *Cache {
	if c.Log == nil {
		c.Log = discard
	}
	if c.Observer == nil {
		c.Observer = discardObserver{}
	}
	if c.Failed == nil {
		c.Failed = func(string, roles.Assumption, *Error) {}
	}
	return New(sts, c)
}

// running returns a cache whose Run lasts as long as the test.
func running(t *testing.T, sts Assumer, c Config) *Cache {
	t.Helper()
	cache := newCache(sts, c)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- cache.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return cache
}
