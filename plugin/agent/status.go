package main

import (
	"context"
	"errors"
	"strings"
	"sync"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/agent"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/conflist"
)

// agentStatus publishes in the lock file whether the agent is ready: its last round had no error, and the
// entry was in the network configuration at the last check.
type agentStatus struct {
	lock         *agent.Lock
	lost         chan error // an error of the lock file
	rules, entry string     // the status texts without an error

	mu                     sync.Mutex
	rulesError, entryError error
}

func newAgentStatus(lock *agent.Lock, guard bool, installer *conflist.Installer) *agentStatus {
	s := &agentStatus{
		lock: lock, lost: make(chan error, 1), rules: "guard and rules in place", entry: "entry chained in " + installer.ConfDir,
		rulesError: errors.New("the first round has not ended yet"), entryError: errors.New("no network configuration has been looked at yet"),
	}
	if !guard {
		s.rules = "rules in place, no guard by --guard=false"
	}
	if !installer.WatchOnly {
		s.entry = "program in " + installer.BinDir + ", " + s.entry
	}
	return s
}

// setRules sets the result of a round.
func (s *agentStatus) setRules(err error) { s.set(&s.rulesError, err) }

// setEntry sets the result of a check of the network configuration.
func (s *agentStatus) setEntry(err error) { s.set(&s.entryError, err) }

func (s *agentStatus) set(field *error, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	*field = err
	status := []string{s.rules, s.entry}
	for i, err := range []error{s.rulesError, s.entryError} {
		if err != nil {
			status[i] = err.Error()
		}
	}
	if err := s.lock.SetStatus(s.rulesError == nil && s.entryError == nil, strings.Join(status, "; ")); err != nil {
		select {
		case s.lost <- err:
		default:
		}
	}
}

// watchLock returns an error when the lock is lost, and nil when ctx ends.
func (s *agentStatus) watchLock(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case err := <-s.lost:
		return err
	}
}
