package netnstest

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

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Namespace is a network namespace. Its methods return errors, for programs and for test beds that
// are not bound to one test. Tests use Netns.
type Namespace struct {
	netns.NsHandle
	mount string // the bind mount, or empty
}

// Create makes a network namespace and calls setUp in it. The caller stays in its own.
func Create(setUp func() error) (*Namespace, error) {
	handle := netns.None()
	err := restoringNetns(func() (err error) {
		if handle, err = netns.New(); err != nil {
			return err
		}
		return setUp()
	})
	n := &Namespace{NsHandle: handle}
	if err != nil {
		n.Close()
		return nil, fmt.Errorf("new network namespace: %w", err)
	}
	return n, nil
}

// restoringNetns calls f, which may change the network namespace of its thread. The thread is not
// ended instead: the kernel would kill the processes that it has started (Pdeathsig).
func restoringNetns(f func() error) error {
	runtime.LockOSThread()
	before, err := netns.Get()
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer func() {
		if err := netns.Set(before); err != nil {
			panic(err) // the thread stays locked, so no other goroutine runs in a wrong namespace
		}
		before.Close()
		runtime.UnlockOSThread()
	}()
	return f()
}

// CreateAt makes a network namespace with a bind mount at path, as "ip netns" and container
// runtimes do. The mount keeps the namespace alive.
func CreateAt(path string) (*Namespace, error) {
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		return nil, err
	}
	n, err := Create(func() error {
		return unix.Mount(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()), path, "none", unix.MS_BIND, "")
	})
	if err != nil {
		os.Remove(path)
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	n.mount = path
	return n, nil
}

// Path returns a path to the namespace, as CNI_NETNS has one.
func (n *Namespace) Path() string {
	if n.mount != "" {
		return n.mount
	}
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), int(n.NsHandle))
}

// Do calls f on the same goroutine in the namespace. Sockets that f opens and processes that it
// starts stay there. Goroutines that f starts are not in it.
func (n *Namespace) Do(f func() error) error {
	return restoringNetns(func() error {
		if err := netns.Set(n.NsHandle); err != nil {
			return fmt.Errorf("enter %s: %w", n.Path(), err)
		}
		return f()
	})
}

// Listen is net.Listen in the namespace.
func (n *Namespace) Listen(network, address string) (l net.Listener, err error) {
	err = n.Do(func() error {
		l, err = net.Listen(network, address)
		return err
	})
	return l, err
}

// DialContext dials from the namespace. The address must be numeric: the resolver would use
// goroutines of its own.
func (n *Namespace) DialContext(ctx context.Context, network, address string) (c net.Conn, err error) {
	err = n.Do(func() error {
		c, err = (&net.Dialer{}).DialContext(ctx, network, address)
		return err
	})
	return c, err
}

// Dial is DialContext without a context.
func (n *Namespace) Dial(network, address string) (net.Conn, error) {
	return n.DialContext(context.Background(), network, address)
}

// HTTP returns a client that opens a connection from the namespace for each request. It follows no
// redirects.
func (n *Namespace) HTTP() *http.Client {
	return &http.Client{
		Transport:     &http.Transport{DialContext: n.DialContext, DisableKeepAlives: true, DisableCompression: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// Run runs a program in the namespace with exactly this environment and returns its standard
// output. The error of a program that fails wraps an *exec.ExitError and contains its standard
// error.
func (n *Namespace) Run(ctx context.Context, env []string, name string, args ...string) (string, error) {
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
func (n *Namespace) Close() error {
	if !n.IsOpen() {
		return nil
	}
	err := n.NsHandle.Close()
	if n.mount != "" {
		err = errors.Join(err, unix.Unmount(n.mount, unix.MNT_DETACH), os.Remove(n.mount))
	}
	return err
}
