// Package podnetns opens the network namespaces of pods.
package podnetns

import (
	"cmp"
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
	var statfs unix.Statfs_t
	if err := unix.Fstatfs(int(pod), &statfs); err != nil || statfs.Type != unix.NSFS_MAGIC {
		pod.Close()
		return netns.None(), &os.PathError{Op: "enter", Path: path, Err: cmp.Or(err, ErrNone)}
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	host, err := netns.Get()
	if err == nil {
		defer host.Close()
		if host.Equal(pod) {
			err = &os.PathError{Op: "enter", Path: path, Err: ErrHost}
		}
	}
	if err != nil {
		pod.Close()
		return netns.None(), err
	}
	return pod, nil
}
