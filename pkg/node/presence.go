package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
)

// The agent's locks in the state directory. The kernel lets go of them with the process, however that ends.
const (
	agentLock = "agent.lock"  // held, together with other agents, by one that runs
	readyLock = "agent.ready" // held by one that has done its job
)

// ErrAgent is the error of a node that an agent runs on.
var ErrAgent = errors.New("the agent runs on this node and would put everything back: stop it first (delete its DaemonSet, or stop its unit)")

// Present is an agent that runs, as others see it. Its methods may be called by any goroutine.
type Present struct {
	dir string

	mu    sync.Mutex
	runs  held
	ready held
}

// held is a lock that is held, and of which file.
type held struct {
	info   fs.FileInfo
	unlock func() // nil while it is not held
}

// hold takes a lock that is shared, where it is not held, or the file at its path is another one by now: somebody removed the state
// directory.
func (h *held) hold(ctx context.Context, file string) error {
	there, err := os.Stat(file)
	if h.unlock != nil && err == nil && os.SameFile(there, h.info) {
		return nil
	}
	unlock, err := attachment.LockShared(ctx, file)
	if err != nil {
		return err
	}
	info, err := os.Stat(file)
	if err != nil {
		unlock()
		return err
	}
	h.letGo()
	h.info, h.unlock = info, unlock
	return nil
}

func (h *held) letGo() {
	if h.unlock != nil {
		h.unlock()
		h.unlock = nil
	}
}

// Presence says in the state directory that an agent runs, until End. The error wraps attachment.ErrLocked while an uninstall is under
// way.
func Presence(ctx context.Context, stateDir string) (*Present, error) {
	if err := os.MkdirAll(stateDir, 0o755); err != nil {
		return nil, err
	}
	p := &Present{dir: stateDir}
	if err := p.runs.hold(ctx, filepath.Join(stateDir, agentLock)); err != nil {
		return nil, fmt.Errorf("an uninstall is under way: %w", err)
	}
	return p, nil
}

// SetReady says whether it has done its job. Saying it again says it anew where the state directory is another by now.
func (p *Present) SetReady(ready bool, log *slog.Logger) {
	p.mu.Lock()
	defer p.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), absence)
	defer cancel()
	if err := p.runs.hold(ctx, filepath.Join(p.dir, agentLock)); err != nil {
		log.Warn("nobody can be told that the agent runs", "error", err)
	}
	if !ready {
		p.ready.letGo()
		return
	}
	// Shared, as an agent may start before its predecessor has ended.
	if err := p.ready.hold(ctx, filepath.Join(p.dir, readyLock)); err != nil {
		log.Warn("nobody can be told that the agent is ready", "error", err)
	}
}

// End takes back what Presence and SetReady said.
func (p *Present) End() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ready.letGo()
	p.runs.letGo()
}

// IsReady tells whether an agent has said that it is, and runs.
func IsReady(stateDir string) (bool, error) {
	f, err := os.Open(filepath.Join(stateDir, readyLock))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	switch err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); {
	case errors.Is(err, unix.EWOULDBLOCK):
		return true, nil
	default:
		return false, err
	}
}

// absence is how long an agent that is just ending is waited for.
const absence = 500 * time.Millisecond

// Absence keeps agents from starting until end is called. The error is ErrAgent where one runs.
func Absence(ctx context.Context, stateDir string) (end func(), err error) {
	if _, err := os.Stat(stateDir); errors.Is(err, fs.ErrNotExist) {
		return func() {}, nil // nothing was ever attached here, and no agent has run
	}
	ctx, cancel := context.WithTimeout(ctx, absence)
	defer cancel()
	end, err = attachment.Lock(ctx, filepath.Join(stateDir, agentLock))
	if errors.Is(err, attachment.ErrLocked) {
		return nil, ErrAgent
	}
	return end, err
}
