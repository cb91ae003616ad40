package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"

	"golang.org/x/sys/unix"
)

// The bytes of the lock file that are locked, as open file description locks (fcntl(2)). The kernel
// releases both when the process ends, and a reader can test them without taking them.
const (
	agentByte = 0 // locked by the node's agent, or by an uninstall
	readyByte = 1 // locked by an agent that is ready
)

const (
	// agentEnd is how long AgentLock.TryLock waits for an agent that is about to end.
	agentEnd = 500 * time.Millisecond
	// agentPoll bounds the time between two tries of a process that waits for the lock.
	agentPoll = 500 * time.Millisecond
	// agentReminder is the time after which a process that waits says so again.
	agentReminder = 10 * time.Minute
	// maxAgentInfo bounds the description in the lock file, and maxShown a text of it that is shown.
	maxAgentInfo, maxShown = 64 << 10, 1 << 10
)

// ErrAgent is the error of a node whose agent lock another process holds.
var ErrAgent = errors.New("another process has the agent lock of this node")

// ErrNoAgent is the error of a node whose agent lock no process holds.
var ErrNoAgent = errors.New("no agent runs on this node")

// AgentInfo describes the process that holds a node's agent lock. That process writes it into the
// lock file, which only root can write.
type AgentInfo struct {
	PID      int               `json:"pid"`              // in the host's PID namespace
	Args     []string          `json:"args"`             // the command line
	Flags    map[string]string `json:"flags"`            // the value of each flag, given or not
	MountNS  uint64            `json:"mountNS"`          // the inode of its mount namespace, which tells containers apart
	StateDir string            `json:"stateDir"`         //
	Status   string            `json:"status,omitempty"` // what was checked, or what is wrong
	Ready    bool              `json:"-"`                // whether the kernel says that the ready byte is locked
}

// NewAgentInfo describes this process. It is called after the host's root directory is entered: the
// process ID in the host's /proc is the one that the host knows the process by.
func NewAgentInfo(args []string, flags map[string]string, stateDir string) (AgentInfo, error) {
	self, err := os.Readlink("/proc/self")
	if err != nil {
		return AgentInfo{}, err
	}
	pid, err := strconv.Atoi(self)
	if err != nil {
		return AgentInfo{}, err
	}
	mounts, err := MountNS()
	return AgentInfo{PID: pid, Args: args, Flags: flags, MountNS: mounts, StateDir: stateDir}, err
}

// MountNS returns the inode of this process's mount namespace. Each container has one of its own.
func MountNS() (uint64, error) { return inode("/proc/self/ns/mnt") }

func inode(path string) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	return st.Ino, nil
}

// String names the process for a person: its ID, command line, cgroup (the systemd unit, or the
// container's ID) and state directory. All of it is bounded and printable.
func (i AgentInfo) String() string {
	if i.PID <= 0 {
		return "a process that has not described itself"
	}
	text := fmt.Sprintf("PID %d (%s)", i.PID, Printable(strings.Join(i.Args, " ")))
	if group := cgroup(i.PID); group != "" {
		text += ", cgroup " + Printable(group)
	}
	return text + ", state directory " + Printable(i.StateDir)
}

// cgroup returns the last element of a process's cgroup; empty where it is unknown.
func cgroup(pid int) string {
	f, err := os.Open(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return ""
	}
	defer f.Close()
	text, _ := io.ReadAll(io.LimitReader(f, maxAgentInfo))
	line, _, _ := strings.Cut(string(text), "\n") // hierarchy-ID:controllers:path (cgroups(7))
	if fields := strings.SplitN(line, ":", 3); len(fields) == 3 {
		if name := filepath.Base(fields[2]); name != "/" && name != "." && name != ".." {
			return name
		}
	}
	return ""
}

// Printable bounds a text of the lock file, and replaces what is not printable.
func Printable(text string) string {
	text = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, text[:min(len(text), maxShown)])
	return text
}

// AgentLock is the lock of the one agent that changes a node. It is a file in the host's /run,
// named by the network namespace that the agent works in, so it is the same lock whatever flags two
// agents were given. The state directory and its removal do not matter to it, and only root can
// open it: a pod on the host's network cannot take it.
//
// The methods may be called by any goroutine.
type AgentLock struct {
	path string

	mu   sync.Mutex
	file *os.File
	info AgentInfo
}

// agentLockFile returns the path of the lock of the network namespace that this thread is in.
func agentLockFile() (string, error) {
	netns, err := inode("/proc/thread-self/ns/net")
	return fmt.Sprintf("/run/kube2iam-cni-agent-%d.lock", netns), err
}

// LockAgent takes the agent lock of this node, and waits for it until ctx ends. While it waits, it
// calls waiting with the holder: at first, when there is another holder, and every ten minutes.
func LockAgent(ctx context.Context, info AgentInfo, waiting func(holder AgentInfo)) (*AgentLock, error) {
	path, err := agentLockFile()
	if err != nil {
		return nil, err
	}
	return lockAgent(ctx, path, info, waiting)
}

func lockAgent(ctx context.Context, path string, info AgentInfo, waiting func(holder AgentInfo)) (*AgentLock, error) {
	l := &AgentLock{path: path, info: info}
	began := time.Now()
	var said time.Time // when waiting was called last, for the holder with the ID pid
	var pid int
	for wait := 10 * time.Millisecond; ; wait = min(2*wait, agentPoll) {
		err := l.tryLock()
		if err == nil {
			return l, nil
		}
		if !errors.Is(err, ErrAgent) {
			return nil, err
		}
		holder, err := readAgentInfo(path)
		now := time.Now()
		// A holder describes itself at once. One that does not is named as such after a second.
		named := err == nil && (holder.PID > 0 || now.Sub(began) > time.Second)
		if named && (said.IsZero() || holder.PID != pid || now.Sub(said) >= agentReminder) {
			waiting(holder)
			said, pid = now, holder.PID
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(wait):
		}
	}
}

// TryLockAgent takes the agent lock of this node. The error wraps ErrAgent and names the holder
// where another process keeps it for longer than an agent takes to end.
func TryLockAgent(ctx context.Context, info AgentInfo) (*AgentLock, error) {
	path, err := agentLockFile()
	if err != nil {
		return nil, err
	}
	return tryLockAgent(ctx, path, info)
}

func tryLockAgent(ctx context.Context, path string, info AgentInfo) (*AgentLock, error) {
	short, cancel := context.WithTimeout(ctx, agentEnd)
	defer cancel()
	l, err := lockAgent(short, path, info, func(AgentInfo) {})
	if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
		holder, _ := readAgentInfo(path)
		return nil, fmt.Errorf("%w: %s", ErrAgent, holder)
	}
	return l, err
}

// tryLock takes the lock of the file at the path, and describes this process in it. The error wraps
// ErrAgent where another process has the lock.
func (l *AgentLock) tryLock() error {
	for {
		f, err := os.OpenFile(l.path, os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return fmt.Errorf("agent lock: %w", err)
		}
		err = lockFile(l.path, f)
		if err != nil {
			f.Close()
			if errors.Is(err, errUnlinked) {
				continue
			}
			return err
		}
		if l.file != nil {
			l.file.Close()
		}
		l.file = f
		return l.describe()
	}
}

// errUnlinked is the error of a lock file that its path does not name any more.
var errUnlinked = errors.New("the agent lock was removed")

// lockFile locks the agent byte of f, which was opened at the path. The error wraps ErrAgent where
// another process has locked it, and errUnlinked where the path does not name f once it is locked: a
// holder removed the file between open and lock, and the next process locks another file.
func lockFile(path string, f *os.File) error {
	err := lockByte(f, agentByte, unix.F_WRLCK)
	switch {
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EACCES):
		return ErrAgent
	case err != nil:
		return fmt.Errorf("agent lock %s: %w", path, err)
	case !isAt(path, f):
		return errUnlinked
	}
	return nil
}

// isAt tells whether a path names an open file.
func isAt(path string, f *os.File) bool {
	there, err := os.Lstat(path)
	if err != nil {
		return false
	}
	open, err := f.Stat()
	return err == nil && os.SameFile(there, open)
}

func lockByte(f *os.File, at int64, how int16) error {
	for {
		err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: how, Start: at, Len: 1})
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// isLocked tells whether another process has a byte of the file locked.
func isLocked(f *os.File, at int64) (bool, error) {
	lock := unix.Flock_t{Type: unix.F_WRLCK, Start: at, Len: 1}
	err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &lock)
	return lock.Type != unix.F_UNLCK, err
}

// describe writes the description and then locks the ready byte or not: so no reader takes an
// earlier description for that of a ready agent.
func (l *AgentLock) describe() error {
	how := int16(unix.F_WRLCK)
	if !l.info.Ready {
		how = unix.F_UNLCK
		if err := lockByte(l.file, readyByte, how); err != nil {
			return err
		}
	}
	info := l.info
	info.Status = Printable(info.Status)
	text, err := json.Marshal(info)
	if err == nil && len(text) > maxAgentInfo {
		info.Args, info.Flags = nil, nil
		text, err = json.Marshal(info)
	}
	if err != nil {
		return err
	}
	if _, err := l.file.WriteAt(append(text, '\n'), 0); err != nil {
		return fmt.Errorf("agent lock: %w", err)
	}
	// What is behind the value is not read.
	if err := l.file.Truncate(int64(len(text) + 1)); err != nil {
		return fmt.Errorf("agent lock: %w", err)
	}
	return lockByte(l.file, readyByte, how)
}

// SetStatus says whether the agent is ready, and what was checked or what is wrong. It takes the lock
// again where somebody removed its file. After an error this process must not change the node any
// more: another one may have the lock.
func (l *AgentLock) SetStatus(ready bool, status string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file == nil {
		return nil // released
	}
	same := l.info.Ready == ready && l.info.Status == status
	l.info.Ready, l.info.Status = ready, status
	if !isAt(l.path, l.file) {
		err := l.tryLock()
		if errors.Is(err, ErrAgent) {
			holder, _ := readAgentInfo(l.path)
			err = fmt.Errorf("the agent lock was removed, and another process took it: %s", holder)
		}
		return err
	}
	if same {
		return nil
	}
	return l.describe()
}

// Unlock releases the lock and removes its file.
func (l *AgentLock) Unlock() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file == nil {
		return
	}
	if isAt(l.path, l.file) {
		os.Remove(l.path)
	}
	l.file.Close()
	l.file = nil
}

// ReadAgentInfo returns what the holder of this node's agent lock says of itself, or ErrNoAgent. It
// takes no lock.
func ReadAgentInfo() (AgentInfo, error) {
	path, err := agentLockFile()
	if err != nil {
		return AgentInfo{}, err
	}
	return readAgentInfo(path)
}

func readAgentInfo(path string) (AgentInfo, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return AgentInfo{}, ErrNoAgent
	}
	if err != nil {
		return AgentInfo{}, fmt.Errorf("agent lock: %w", err)
	}
	defer f.Close()
	if held, err := isLocked(f, agentByte); err != nil {
		return AgentInfo{}, fmt.Errorf("agent lock %s: %w", path, err)
	} else if !held {
		return AgentInfo{}, ErrNoAgent
	}
	ready, err := isLocked(f, readyByte)
	if err != nil {
		return AgentInfo{}, fmt.Errorf("agent lock %s: %w", path, err)
	}
	var info AgentInfo
	// The holder may be writing it. What cannot be read is a process that has not described itself.
	for range 5 {
		info = AgentInfo{}
		if json.NewDecoder(io.NewSectionReader(f, 0, maxAgentInfo+1)).Decode(&info) == nil {
			break
		}
		info = AgentInfo{}
	}
	info.Status, info.StateDir = Printable(info.Status), Printable(info.StateDir)
	info.Ready = ready && info.PID > 0
	return info, nil
}
