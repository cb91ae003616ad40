package credentials

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/roles"
)

// denyingSTS denies the roles of some pods. Of the renewals for the others, it stores the shortest
// remaining time of the renewed session.
type denyingSTS struct {
	mu       sync.Mutex
	obtained map[string]time.Time // by role
	least    time.Duration
}

const deniedID = "denied"

func (s *denyingSTS) AssumeRole(_ context.Context, a roles.Assumption) (*Credentials, error) {
	time.Sleep(100 * time.Millisecond)
	if a.ExternalID == deniedID {
		return nil, &Error{Kind: Denied, Code: "AccessDenied"}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	if last, isRenewal := s.obtained[a.RoleARN]; isRenewal {
		s.least = min(s.least, last.Add(time.Hour).Sub(now))
	}
	s.obtained[a.RoleARN] = now
	return &Credentials{AccessKeyID: "A", SecretAccessKey: "s", SessionToken: "t", Obtained: now, Expiration: now.Add(time.Hour)}, nil
}

// TestDeniedPodsDelayNoRenewal has a node with many pods whose roles STS denies. Their calls are
// repeated in the background, after the renewals and prefetches of the other pods.
func TestDeniedPodsDelayNoRenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &denyingSTS{obtained: make(map[string]time.Time), least: time.Hour}
		c := running(t, s, Config{Log: discard, Observer: discardObserver{}, Failed: func(string, roles.Assumption, *Error) {}})
		for i := range 10 {
			c.Hold(fmt.Sprint("good", i), assumption(fmt.Sprint("good", i)))
		}
		for i := range 200 {
			a := assumption(fmt.Sprint("bad", i))
			a.ExternalID = deniedID
			c.Hold(fmt.Sprint("bad", i), a)
		}
		time.Sleep(6 * time.Hour)
		began := time.Now()
		c.Hold("new", assumption("new"))
		time.Sleep(time.Minute)
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.least < 29*time.Minute {
			t.Errorf("a session was renewed %s before its end, want 30m0s", s.least)
		}
		if took := s.obtained[assumption("new").RoleARN].Sub(began); took < 0 || took > 10*time.Second {
			t.Errorf("a new pod's credentials were fetched after %s", took)
		}
	})
}
