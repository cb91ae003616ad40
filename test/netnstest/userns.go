// Package netnstest gives tests network namespaces, also to those of an ordinary user.
//
// A package whose tests need a network namespace calls Main in its TestMain and New in its tests:
//
//	func TestMain(m *testing.M) { netnstest.Main(m) }
//
//	func TestRules(t *testing.T) {
//		host, pod := netnstest.New(t), netnstest.New(t)
//		host.Enter()
//		host.Veth("veth0", pod, "eth0")
//	}
package netnstest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

const (
	// inUserNamespace is set in the environment of a test binary that Main has started.
	inUserNamespace = "NETNSTEST_IN_USER_NAMESPACE"
	// exitUnavailable is the exit status of such a binary if the namespace lacks privileges.
	exitUnavailable = 120
)

// unavailable is the reason why this process has no privileges in network namespaces, or nil.
var unavailable error

// Main runs the tests of a package by Run and exits with their status.
func Main(m *testing.M) { os.Exit(Run(m)) }

// Run runs the tests of a package and returns their exit status. If the user is not root, it runs
// the test binary again as root of a user namespace, with a network and a mount namespace of its
// own. Where the machine disables unprivileged user namespaces, New skips its test and names the
// reason.
func Run(m *testing.M) int {
	switch {
	case os.Getenv(inUserNamespace) != "":
		if err := setUp(); err != nil {
			fmt.Fprintln(os.Stderr, "netnstest:", err)
			return exitUnavailable
		}
	case os.Geteuid() != 0:
		code, err := runInUserNamespace()
		if err == nil {
			return code
		}
		unavailable = err
	}
	// The machine's lock of iptables-legacy is not the tests'.
	dir, err := os.MkdirTemp("", "netnstest")
	if err != nil {
		fmt.Fprintln(os.Stderr, "netnstest:", err)
		return 1
	}
	defer os.RemoveAll(dir)
	os.Setenv("XTABLES_LOCKFILE", filepath.Join(dir, "xtables.lock"))
	return m.Run()
}

// MainAsRoot runs the tests of a suite that needs the privileges of the machine's root, such as
// loading kernel modules. For an ordinary user it runs none of them, and prints why.
func MainAsRoot(m *testing.M) {
	if os.Geteuid() != 0 {
		fmt.Println("skipped: this suite needs root")
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// InUserNamespace returns whether the tests run as root of a user namespace: it maps a single user,
// so no file can be owned by another one.
func InUserNamespace() bool { return os.Getenv(inUserNamespace) != "" }

func runInUserNamespace() (code int, err error) {
	runtime.LockOSThread() // Pdeathsig is sent when the thread ends that started the child
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), inUserNamespace+"=1", "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNET | unix.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Geteuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{HostID: os.Getegid(), Size: 1}},
		Pdeathsig:   unix.SIGKILL,
	}
	err = cmd.Run()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0, nil
	case !errors.As(err, &exit):
		return 0, fmt.Errorf("unprivileged user namespaces are disabled: %w", err)
	case exit.ExitCode() == exitUnavailable:
		return 0, errors.New("user namespaces have no privileges (kernel.apparmor_restrict_unprivileged_userns?)")
	case exit.ExitCode() < 0:
		fmt.Fprintln(os.Stderr, "netnstest:", exit)
		return 1, nil
	}
	return exit.ExitCode(), nil
}

// setUp mounts what programs expect of a system: /run is writable, and /sys shows the network
// namespace.
func setUp() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("private mounts: %w", err)
	}
	if err := unix.Mount("tmpfs", "/run", "tmpfs", 0, "mode=755"); err != nil {
		return fmt.Errorf("mount /run: %w", err)
	}
	if err := unix.Mount("sysfs", "/sys", "sysfs", unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /sys: %w", err)
	}
	return setLinkUp("lo")
}
