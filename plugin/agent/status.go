package main

import (
	"errors"
	"strings"
	"sync"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/agent"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/conflist"
)

// agentStatus publishes in the lock file whether the agent is ready: its last round had no error,
// and the entry was in the network configuration at the last check.
type agentStatus struct {
	lock *agent.Lock
	lost func(error) // is called with an error of the lock file

	mu           sync.Mutex
	rules, entry check
}

// check is the last result of something that the agent checks.
type check struct {
	success string // the text if there is no error
	err     error
}

func (c check) String() string {
	if c.err != nil {
		return c.err.Error()
	}
	return c.success
}

func newAgentStatus(lock *agent.Lock, guard bool, installer *conflist.Installer, lost func(error)) *agentStatus {
	s := &agentStatus{
		lock: lock, lost: lost,
		rules: check{"guard and rules in place", errors.New("the first round has not ended yet")},
		entry: check{"entry chained in " + installer.ConfDir, errors.New("no network configuration has been looked at yet")},
	}
	if !guard {
		s.rules.success = "rules in place, no guard by --guard=false"
	}
	if !installer.WatchOnly {
		s.entry.success = "program in " + installer.BinDir + ", " + s.entry.success
	}
	return s
}

// set sets the result of one of the checks of s.
func (s *agentStatus) set(c *check, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c.err = err
	isReady := s.rules.err == nil && s.entry.err == nil
	if err := s.lock.SetStatus(isReady, strings.Join([]string{s.rules.String(), s.entry.String()}, "; ")); err != nil {
		s.lost(err)
	}
}
