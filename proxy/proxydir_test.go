package main

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/test/netnstest"
)

func TestMain(m *testing.M) { netnstest.Main(m) }

func TestMakeProxyDir(t *testing.T) {
	for name, before := range map[string]func(stateDir string) error{
		"no state directory":  func(string) error { return nil },
		"state directory":     func(s string) error { return os.Mkdir(s, 0o755) },
		"made by the kubelet": func(s string) error { return os.MkdirAll(proxyDir(s), 0o755) },
		"writable for all users": func(s string) error {
			return errors.Join(os.MkdirAll(proxyDir(s), 0o700), os.Chmod(proxyDir(s), 0o777))
		},
	} {
		t.Run(name, func(t *testing.T) {
			state := filepath.Join(t.TempDir(), "state")
			if err := before(state); err != nil {
				t.Fatal(err)
			}
			if err := makeProxyDir(state); err != nil {
				t.Fatal(err)
			}
			if info, err := os.Lstat(proxyDir(state)); err != nil || info.Mode() != os.ModeDir|0o700 {
				t.Errorf("%v, %v", info.Mode(), err)
			}
		})
	}
}

func TestMakeProxyDirRefuses(t *testing.T) {
	for name, before := range map[string]func(t *testing.T, dir string) error{
		"file":                      func(_ *testing.T, d string) error { return os.WriteFile(d, nil, 0o600) },
		"symbolic link":             func(_ *testing.T, d string) error { return os.Symlink(os.TempDir(), d) },
		"dangling symbolic link":    func(_ *testing.T, d string) error { return os.Symlink("none", d) },
		"symbolic link to itself":   func(_ *testing.T, d string) error { return os.Symlink(d, d) },
		"directory of another user": func(t *testing.T, d string) error { return errors.Join(os.Mkdir(d, 0o700), giveAway(t, d)) },
	} {
		t.Run(name, func(t *testing.T) {
			state := t.TempDir()
			if err := before(t, proxyDir(state)); err != nil {
				t.Fatal(err)
			}
			if err := makeProxyDir(state); err == nil || !strings.Contains(err.Error(), proxyDir(state)) {
				t.Errorf("%v", err)
			}
		})
	}
}

// giveAway makes another user the owner of a directory. A user namespace has no other user: there,
// a read-only directory of the machine's root is mounted over it.
func giveAway(t *testing.T, dir string) error {
	if !netnstest.InUserNamespace() {
		return os.Chown(dir, 65534, 65534)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return unix.Mount("/sys/kernel", dir, "", unix.MS_BIND, "")
}

// mounted calls do in a mount namespace with a state directory that is mounted as in the proxy's
// container: host is its path on the host, and container the path at which it is mounted read-only,
// with the proxy's directory in it read-write.
func mounted(t *testing.T, do func(host, container string) error) error {
	t.Helper()
	host, container := filepath.Join(t.TempDir(), "host"), t.TempDir()
	if err := os.MkdirAll(proxyDir(host), 0o755); err != nil {
		t.Fatal(err)
	}
	failed := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread and its mount namespace end with the goroutine
		failed <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_FS); err != nil {
				return err
			}
			if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
				return err
			}
			if err := unix.Mount(host, container, "", unix.MS_BIND, ""); err != nil {
				return err
			}
			if err := unix.Mount("", container, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""); err != nil {
				return err
			}
			if err := unix.Mount(proxyDir(host), proxyDir(container), "", unix.MS_BIND, ""); err != nil {
				return err
			}
			return do(host, container)
		}()
	}()
	return <-failed
}

func TestProxyWritesItsDirectoryOnly(t *testing.T) {
	err := mounted(t, func(_, container string) error {
		if err := makeProxyDir(container); err != nil {
			return err
		}
		if err := checkMounted(container); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(container, "file"), nil, 0o600); !errors.Is(err, unix.EROFS) {
			t.Errorf("the state directory can be written: %v", err)
		}
		return os.WriteFile(filepath.Join(proxyDir(container), "file"), nil, 0o600)
	})
	if err != nil {
		t.Error(err)
	}
}

// TestRemovedStateDirectory removes the state directory, or the proxy's, under the mount.
func TestRemovedStateDirectory(t *testing.T) {
	for name, remove := range map[string]func(host string) error{
		"state directory": os.RemoveAll,
		"state directory, made again": func(host string) error {
			return errors.Join(os.RemoveAll(host), os.MkdirAll(proxyDir(host), 0o755))
		},
		"proxy's directory": func(host string) error { return os.Remove(proxyDir(host)) },
		"proxy's directory, made again": func(host string) error {
			return errors.Join(os.Remove(proxyDir(host)), os.Mkdir(proxyDir(host), 0o755))
		},
		"proxy's directory, after a rename": func(host string) error {
			return errors.Join(os.Rename(proxyDir(host), host+".other"), os.Remove(host+".other"))
		},
	} {
		t.Run(name, func(t *testing.T) {
			err := mounted(t, func(host, container string) error {
				removed := make(chan error)
				go func() { removed <- remove(host) }() // outside the mount namespace, as on the host
				if err := <-removed; err != nil {
					return err
				}
				return checkMounted(container)
			})
			if !errors.Is(err, errRemoved) {
				t.Errorf("%v", err)
			}
		})
	}
}

// TestStateDirectoryWithoutMount: a proxy outside a container sees a directory that is made later,
// and does not make a state directory that an uninstall has removed.
func TestStateDirectoryWithoutMount(t *testing.T) {
	state := filepath.Join(t.TempDir(), "state")
	if err := checkMounted(state); err != nil {
		t.Errorf("no state directory: %v", err)
	}
	if _, err := os.Stat(state); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the state directory was made: %v", err)
	}
	if err := os.Mkdir(state, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := checkMounted(state); err != nil {
		t.Errorf("state directory: %v", err)
	}
	if info, err := os.Stat(proxyDir(state)); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the proxy's directory: %v, %v", info, err)
	}
}
