package testbed

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"strings"

	"github.com/containernetworking/plugins/pkg/ns"
	"golang.org/x/sys/unix"
)

// Netns is a network namespace. A bind mount keeps it alive, as with "ip netns" and container
// runtimes.
type Netns struct {
	ns   ns.NetNS
	path string
}

// newNetns makes a namespace and its bind mount.
func newNetns(path string) (*Netns, error) {
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		return nil, err
	}
	made := make(chan error)
	go func() {
		runtime.LockOSThread()
		err := holdNewNetns(path)
		// A thread that is back in its namespace is unlocked, not ended: processes that it started
		// would die with it (Pdeathsig).
		if !errors.Is(err, errLost) {
			runtime.UnlockOSThread()
		}
		made <- err
	}()
	if err := <-made; err != nil {
		os.Remove(path)
		return nil, fmt.Errorf("network namespace %s: %w", path, err)
	}
	handle, err := ns.GetNS(path)
	if err != nil {
		unix.Unmount(path, unix.MNT_DETACH)
		os.Remove(path)
		return nil, fmt.Errorf("network namespace %s: %w", path, err)
	}
	return &Netns{ns: handle, path: path}, nil
}

var errLost = errors.New("the thread cannot return to its network namespace")

// holdNewNetns must run on a locked thread. The thread is in its former namespace afterwards,
// except with errLost.
func holdNewNetns(path string) error {
	own := fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid())
	before, err := unix.Open(own, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(before)
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("unshare: %w (needs root)", err)
	}
	err = unix.Mount(own, path, "none", unix.MS_BIND, "")
	if back := unix.Setns(before, unix.CLONE_NEWNET); back != nil {
		return errors.Join(errLost, back, err)
	}
	return err
}

// Path returns the file of the bind mount, for CNI_NETNS.
func (n *Netns) Path() string { return n.path }

// Do calls f on a thread in the namespace. Sockets that f opens and processes that it starts stay
// there. Goroutines that f starts are not in it.
func (n *Netns) Do(f func() error) error { return n.ns.Do(func(ns.NetNS) error { return f() }) }

// Listen is net.Listen in the namespace.
func (n *Netns) Listen(network, address string) (l net.Listener, err error) {
	err = n.Do(func() error {
		l, err = net.Listen(network, address)
		return err
	})
	return l, err
}

// DialContext dials from the namespace. The address must be numeric: the resolver would use
// goroutines of its own.
func (n *Netns) DialContext(ctx context.Context, network, address string) (c net.Conn, err error) {
	err = n.Do(func() error {
		c, err = (&net.Dialer{}).DialContext(ctx, network, address)
		return err
	})
	return c, err
}

// Dial is DialContext without a context.
func (n *Netns) Dial(network, address string) (net.Conn, error) {
	return n.DialContext(context.Background(), network, address)
}

// HTTP returns a client that opens a connection from the namespace for each request. It follows no
// redirects.
func (n *Netns) HTTP() *http.Client {
	return &http.Client{
		Transport:     &http.Transport{DialContext: n.DialContext, DisableKeepAlives: true, DisableCompression: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// Run runs a program in the namespace with exactly this environment and returns its standard
// output. The error of a program that fails wraps an *exec.ExitError and contains its standard
// error.
func (n *Netns) Run(ctx context.Context, env []string, name string, args ...string) (string, error) {
	var stdout, stderr bytes.Buffer
	err := n.Do(func() error {
		cmd := exec.CommandContext(ctx, name, args...)
		cmd.Env, cmd.Stdout, cmd.Stderr = env, &stdout, &stderr
		cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
		return cmd.Run()
	})
	if err != nil {
		err = fmt.Errorf("%s: %w: %s", strings.Join(append([]string{name}, args...), " "), err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), err
}

// Close removes the bind mount. The namespace ends with the last process and socket in it. A second
// call does nothing.
func (n *Netns) Close() error {
	if n.ns == nil {
		return nil
	}
	err := errors.Join(n.ns.Close(), unix.Unmount(n.path, unix.MNT_DETACH), os.Remove(n.path))
	n.ns = nil
	return err
}
