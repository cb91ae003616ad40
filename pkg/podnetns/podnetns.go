// Package podnetns opens the network namespaces of pods.
package podnetns

import (
	"errors"
	"os"
	"runtime"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Errors of paths that lead to no pod's network namespace.
var (
	ErrHost = errors.New("it is the host's own network namespace")
	ErrNone = errors.New("it is no network namespace")
)

// Open opens the network namespace at path. The error is fs.ErrNotExist if there is no such path,
// ErrNone if it leads to another file, such as one that a namespace was mounted on, and ErrHost if
// it leads to the namespace of the calling thread, the host's: what is done for one pod would
// concern the node. The two are compared by device and inode, because a namespace has many paths,
// and /proc/PID/ns/net leads to another namespace when the PID is reused.
func Open(path string) (netns.NsHandle, error) {
	pod, err := netns.GetFromPath(path)
	if err != nil {
		return netns.None(), &os.PathError{Op: "open", Path: path, Err: err}
	}
	if err := check(pod); err != nil {
		pod.Close()
		return netns.None(), &os.PathError{Op: "enter", Path: path, Err: err}
	}
	return pod, nil
}

func check(pod netns.NsHandle) error {
	var statfs unix.Statfs_t
	if err := unix.Fstatfs(int(pod), &statfs); err != nil {
		return err
	}
	if statfs.Type != unix.NSFS_MAGIC {
		return ErrNone
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	host, err := netns.Get()
	if err != nil {
		return err
	}
	defer host.Close()
	if host.Equal(pod) {
		return ErrHost
	}
	return nil
}
