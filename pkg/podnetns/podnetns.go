// Package podnetns opens the network namespaces of pods.
package podnetns

import (
	"errors"
	"os"
	"runtime"

	"github.com/vishvananda/netns"
)

// ErrHost is the error of a path that leads to the host's network namespace.
var ErrHost = errors.New("it is the host's own network namespace")

// Open opens the network namespace at path. The error is ErrHost if that is the namespace of the
// calling thread, the host's: what is done for one pod would concern the node. The two are compared
// by device and inode, because a namespace has many paths, and /proc/PID/ns/net leads to another
// namespace when the PID is reused.
func Open(path string) (netns.NsHandle, error) {
	pod, err := netns.GetFromPath(path)
	if err != nil {
		return netns.None(), &os.PathError{Op: "open", Path: path, Err: err}
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
