package main

import (
	"context"
	"errors"
	"strings"
	"sync"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/agent"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/conflist"
)

// readiness publishes in the lock file whether the agent is ready: its last round had no error, and the
// entry was in the network configuration at the last check.
type readiness struct {
	lock         *agent.Lock
	lost         chan error // an error of the lock file
	rules, entry string     // the status texts without an error

	mu                     sync.Mutex
	rulesError, entryError error
}

func newReadiness(lock *agent.Lock, guard bool, installer *conflist.Installer) *readiness {
	r := &readiness{
		lock: lock, lost: make(chan error, 1), rules: "guard and rules in place", entry: "entry chained in " + installer.ConfDir,
		rulesError: errors.New("the first round has not ended yet"), entryError: errors.New("no network configuration has been looked at yet"),
	}
	if !guard {
		r.rules = "rules in place, no guard by --guard=false"
	}
	if !installer.WatchOnly {
		r.entry = "program in " + installer.BinDir + ", " + r.entry
	}
	return r
}

// setRules sets the result of a round.
func (r *readiness) setRules(err error) { r.set(&r.rulesError, err) }

// setEntry sets the result of a check of the network configuration.
func (r *readiness) setEntry(err error) { r.set(&r.entryError, err) }

func (r *readiness) set(field *error, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	*field = err
	status := []string{r.rules, r.entry}
	for i, err := range []error{r.rulesError, r.entryError} {
		if err != nil {
			status[i] = err.Error()
		}
	}
	if err := r.lock.SetStatus(r.rulesError == nil && r.entryError == nil, strings.Join(status, "; ")); err != nil {
		select {
		case r.lost <- err:
		default:
		}
	}
}

// watchLock returns an error when the lock is lost, and nil when ctx ends.
func (r *readiness) watchLock(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case err := <-r.lost:
		return err
	}
}
