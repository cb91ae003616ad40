package agent

import (
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unicode"

	"golang.org/x/sys/unix"
)

// maxInfo bounds the description in the lock file, and maxText a text of it that is shown.
const maxInfo, maxText = 64 << 10, 1 << 10

// Info describes the process that holds a node's agent lock. That process writes it into the lock
// file, which only root can write.
type Info struct {
	PID      int               `json:"pid"`              // in the host's PID namespace
	Args     []string          `json:"args"`             // the command line
	Flags    map[string]string `json:"flags"`            // the value of each flag, set or not
	MountNS  uint64            `json:"mountNS"`          // of its mount namespace: an inode
	StateDir string            `json:"stateDir"`         //
	Status   string            `json:"status,omitempty"` // what was checked, or what is wrong
	IsReady  bool              `json:"-"`                // by the lock of the ready byte
}

// NewInfo describes this process. The caller has entered the host's root directory: the process ID
// in the host's /proc is that of the host's PID namespace.
func NewInfo(args []string, flags map[string]string, stateDir string) (Info, error) {
	self, err := os.Readlink("/proc/self")
	if err != nil {
		return Info{}, err
	}
	pid, err := strconv.Atoi(self)
	if err != nil {
		return Info{}, err
	}
	mounts, err := MountNS()
	return Info{PID: pid, Args: args, Flags: flags, MountNS: mounts, StateDir: stateDir}, err
}

// MountNS returns the inode of this process's mount namespace. Each container has one.
func MountNS() (uint64, error) { return inode("/proc/self/ns/mnt") }

// netnsID returns the inode of this thread's network namespace.
func netnsID() (uint64, error) { return inode("/proc/thread-self/ns/net") }

func inode(path string) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	return st.Ino, nil
}

// encode returns the description as JSON. It leaves out arguments and flags that are too long.
func (i Info) encode() ([]byte, error) {
	i.Status = Printable(i.Status)
	text, err := json.Marshal(i)
	if err == nil && len(text) > maxInfo {
		i.Args, i.Flags = nil, nil
		text, err = json.Marshal(i)
	}
	return append(text, '\n'), err
}

// String names the process by its ID, command line, cgroup (the systemd unit, or the container's
// ID) and state directory. The text is bounded and printable.
func (i Info) String() string {
	if i.PID <= 0 {
		return "a process that has not described itself"
	}
	text := fmt.Sprintf("PID %d (%s)", i.PID, Printable(strings.Join(i.Args, " ")))
	if group := cgroup(i.PID); group != "" {
		text += ", cgroup " + Printable(group)
	}
	return text + ", state directory " + Printable(i.StateDir)
}

// cgroup returns the last element of a process's cgroup, or "".
func cgroup(pid int) string {
	f, err := os.Open(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return ""
	}
	defer f.Close()
	text, _ := io.ReadAll(io.LimitReader(f, maxInfo))
	line, _, _ := strings.Cut(string(text), "\n") // hierarchy-ID:controllers:path (cgroups(7))
	if fields := strings.SplitN(line, ":", 3); len(fields) == 3 {
		if name := filepath.Base(fields[2]); name != "/" && name != "." && name != ".." {
			return name
		}
	}
	return ""
}

// Printable bounds a text, and replaces characters that are not printable.
func Printable(text string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, text[:min(len(text), maxText)])
}
