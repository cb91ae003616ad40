package redirect

import (
	"errors"
	"fmt"
	"io/fs"
	"runtime"

	"github.com/vishvananda/netns"
)

// ErrHostNetns is the error of a path that leads to the host's own network namespace instead of a pod's.
var ErrHostNetns = errors.New("it is the host's own network namespace")

// openPod opens a pod's network namespace. It refuses the host's own, which is the calling thread's: what is made or removed for
// one pod would concern the node. They are compared by device and inode, because one namespace has many paths, and the path
// /proc/PID/ns/net leads elsewhere once the PID is reused.
func openPod(path string) (netns.NsHandle, error) {
	pod, err := netns.GetFromPath(path)
	if err != nil {
		return netns.None(), &fs.PathError{Op: "open", Path: path, Err: err}
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	host, err := netns.Get()
	if err != nil {
		pod.Close()
		return netns.None(), fmt.Errorf("the host's network namespace: %w", err)
	}
	defer host.Close()
	if host.Equal(pod) {
		pod.Close()
		return netns.None(), &fs.PathError{Op: "enter", Path: path, Err: ErrHostNetns}
	}
	return pod, nil
}
