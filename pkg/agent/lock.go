package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/filelock"
)

// The bytes of the lock file.
const (
	agentByte = 0 // locked by the node's agent, or by uninstall
	readyByte = 1 // locked by an agent that is ready
)

const (
	// lockWait is how long TryLock waits for an agent that is about to end.
	lockWait = 500 * time.Millisecond
	// maxLockPoll bounds the time between two attempts to lock.
	maxLockPoll = 500 * time.Millisecond
	// reminderInterval is the time between two reports of a process that waits for the lock.
	reminderInterval = 10 * time.Minute
)

// Errors of the node's agent lock.
var (
	ErrRunning    = errors.New("another process has the agent lock of this node")
	ErrNotRunning = errors.New("no agent runs on this node")
)

// Lock is the lock of the one agent that changes a node. It is a file in the host's /run, named by
// the network namespace of the agent, so agents with different flags or state directories have one
// lock. Only root can open it: a pod on the host's network cannot take it.
//
// The methods are safe for concurrent use.
type Lock struct {
	path string

	mu   sync.Mutex
	file *os.File
	info Info
}

// lockPath returns the path of the lock of this thread's network namespace.
func lockPath() (string, error) {
	netns, err := netnsID()
	return fmt.Sprintf("/run/kube2iam-cni-agent-%d.lock", netns), err
}

// WaitForLock takes the node's agent lock, and waits for it until ctx ends. It calls waiting with
// the holder when it begins to wait, when the holder changes, and every ten minutes.
func WaitForLock(ctx context.Context, info Info, waiting func(holder Info)) (*Lock, error) {
	path, err := lockPath()
	if err != nil {
		return nil, err
	}
	return waitForLock(ctx, path, info, waiting)
}

func waitForLock(ctx context.Context, path string, info Info, waiting func(holder Info)) (*Lock, error) {
	l := &Lock{path: path, info: info}
	began := time.Now()
	var reported time.Time // the last call of waiting, for the holder with the ID pid
	var pid int
	for wait := 10 * time.Millisecond; ; wait = min(2*wait, maxLockPoll) {
		err := l.tryLock()
		if err == nil {
			return l, nil
		}
		if !errors.Is(err, ErrRunning) {
			return nil, err
		}
		holder, err := readInfo(path)
		now := time.Now()
		// A holder describes itself immediately. One that does not is reported after a second.
		isNamed := err == nil && (holder.PID > 0 || now.Sub(began) > time.Second)
		if isNamed && (reported.IsZero() || holder.PID != pid || now.Sub(reported) >= reminderInterval) {
			waiting(holder)
			reported, pid = now, holder.PID
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(wait):
		}
	}
}

// TryLock takes the node's agent lock. If another process keeps it for longer than an agent takes
// to end, the error is ErrRunning and names the process.
func TryLock(ctx context.Context, info Info) (*Lock, error) {
	path, err := lockPath()
	if err != nil {
		return nil, err
	}
	return tryLock(ctx, path, info)
}

func tryLock(ctx context.Context, path string, info Info) (*Lock, error) {
	short, cancel := context.WithTimeout(ctx, lockWait)
	defer cancel()
	l, err := waitForLock(short, path, info, func(Info) {})
	if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
		holder, _ := readInfo(path)
		return nil, fmt.Errorf("%w: %s", ErrRunning, holder)
	}
	return l, err
}

// tryLock locks the file at the path and describes this process in it. The error is ErrRunning if
// another process has the lock.
func (l *Lock) tryLock() error {
	f, err := filelock.Open(l.path, func(f *os.File) error { return filelock.TryLock(f, agentByte, filelock.Exclusive) })
	if errors.Is(err, filelock.ErrLocked) {
		return ErrRunning
	}
	if err != nil {
		return fmt.Errorf("agent lock: %w", err)
	}
	if l.file != nil {
		l.file.Close()
	}
	l.file = f
	return l.describe()
}

// describe writes the description and then locks the ready byte. It unlocks the byte first: no
// reader takes an earlier description for that of a ready agent.
func (l *Lock) describe() error {
	if !l.info.IsReady {
		if err := filelock.Unlock(l.file, readyByte); err != nil {
			return err
		}
	}
	text, err := l.info.encode()
	if err != nil {
		return err
	}
	if _, err := l.file.WriteAt(text, 0); err != nil {
		return fmt.Errorf("agent lock: %w", err)
	}
	if err := l.file.Truncate(int64(len(text))); err != nil { // readers stop at the end of the JSON value
		return fmt.Errorf("agent lock: %w", err)
	}
	if !l.info.IsReady {
		return nil
	}
	return filelock.TryLock(l.file, readyByte, filelock.Exclusive)
}

// SetStatus publishes whether the agent is ready, and what it checked or what is wrong. It locks
// again if the file was removed. After an error this process must not change the node: another
// agent can have the lock.
func (l *Lock) SetStatus(isReady bool, status string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file == nil {
		return nil // released
	}
	isSame := l.info.IsReady == isReady && l.info.Status == status
	l.info.IsReady, l.info.Status = isReady, status
	if !filelock.IsAt(l.path, l.file) {
		err := l.tryLock()
		if errors.Is(err, ErrRunning) {
			holder, _ := readInfo(l.path)
			err = fmt.Errorf("the agent lock was removed, and another process took it: %s", holder)
		}
		return err
	}
	if isSame {
		return nil
	}
	return l.describe()
}

// Unlock releases the lock and removes its file.
func (l *Lock) Unlock() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file == nil {
		return
	}
	if filelock.IsAt(l.path, l.file) {
		os.Remove(l.path)
	}
	l.file.Close()
	l.file = nil
}

// ReadInfo returns the description of the process that holds this node's agent lock, or
// ErrNotRunning. It locks nothing.
func ReadInfo() (Info, error) {
	path, err := lockPath()
	if err != nil {
		return Info{}, err
	}
	return readInfo(path)
}

func readInfo(path string) (Info, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return Info{}, ErrNotRunning
	}
	if err != nil {
		return Info{}, fmt.Errorf("agent lock: %w", err)
	}
	defer f.Close()
	isRunning, err := filelock.IsLocked(f, agentByte)
	if err != nil {
		return Info{}, fmt.Errorf("agent lock %s: %w", path, err)
	}
	if !isRunning {
		return Info{}, ErrNotRunning
	}
	isReady, err := filelock.IsLocked(f, readyByte)
	if err != nil {
		return Info{}, fmt.Errorf("agent lock %s: %w", path, err)
	}
	var info Info
	// The holder may be writing. A description that stays unreadable is missing.
	for range 5 {
		info = Info{}
		if json.NewDecoder(io.NewSectionReader(f, 0, maxInfo+1)).Decode(&info) == nil {
			break
		}
		info = Info{}
	}
	info.Status, info.StateDir = Printable(info.Status), Printable(info.StateDir)
	info.IsReady = isReady && info.PID > 0
	return info, nil
}
