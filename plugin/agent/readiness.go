package main

import (
	"context"
	"errors"
	"strings"
	"sync"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/conflist"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/node"
)

// readiness is what an agent has checked, as `kube2iam-agent ready` reports it: it is ready where the
// last round left the rules as they should be and the last look found the entry chained.
type readiness struct {
	lock *node.AgentLock
	lost chan error // why the agent may not go on
	// texts of what is in place
	rules, entry string

	mu                     sync.Mutex
	rulesError, entryError error
}

func newReadiness(lock *node.AgentLock, guard bool, install *conflist.Installer) *readiness {
	r := &readiness{
		lock: lock, lost: make(chan error, 1), rules: "guard and rules in place", entry: "entry chained in " + install.ConfDir,
		rulesError: errors.New("the first round has not ended yet"), entryError: errors.New("no network configuration has been looked at yet"),
	}
	if !guard {
		r.rules = "rules in place, no guard by --guard=false"
	}
	if !install.WatchOnly {
		r.entry = "program in " + install.BinDir + ", " + r.entry
	}
	return r
}

// setRules takes the error of a round.
func (r *readiness) setRules(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.rulesError = err
	r.publish()
}

// setEntry takes the error of a look at the network configurations.
func (r *readiness) setEntry(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.entryError = err
	r.publish()
}

// publish writes the state into the lock file. r.mu is held.
func (r *readiness) publish() {
	var texts []string
	for _, part := range []struct {
		err  error
		text string
	}{{r.rulesError, r.rules}, {r.entryError, r.entry}} {
		if part.err != nil {
			texts = append(texts, part.err.Error())
		} else {
			texts = append(texts, part.text)
		}
	}
	if err := r.lock.SetStatus(r.rulesError == nil && r.entryError == nil, strings.Join(texts, "; ")); err != nil {
		select {
		case r.lost <- err:
		default:
		}
	}
}

// untilLost waits until ctx ends or the lock is lost, and returns the error of the latter.
func (r *readiness) untilLost(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case err := <-r.lost:
		return err
	}
}
