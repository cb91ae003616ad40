package main

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestProxyDirectoryIsTheProxysAlone(t *testing.T) {
	for name, before := range map[string]func(stateDir string) error{
		"nothing there":         func(string) error { return nil },
		"the state directory":   func(s string) error { return os.Mkdir(s, 0o755) },
		"as the kubelet has it": func(s string) error { return os.MkdirAll(proxyDir(s), 0o755) },
		"open to all": func(s string) error {
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

func TestProxyDirectoryOfAnotherIsRefused(t *testing.T) {
	for name, before := range map[string]func(dir string) error{
		"a file":           func(d string) error { return os.WriteFile(d, nil, 0o600) },
		"a link":           func(d string) error { return os.Symlink(os.TempDir(), d) },
		"another user's":   func(d string) error { return errors.Join(os.Mkdir(d, 0o700), os.Chown(d, 65534, 65534)) },
		"a dangling link":  func(d string) error { return os.Symlink("none", d) },
		"a link to itself": func(d string) error { return os.Symlink(d, d) },
	} {
		t.Run(name, func(t *testing.T) {
			state := t.TempDir()
			if err := before(proxyDir(state)); errors.Is(err, unix.EPERM) {
				t.Skip("it takes root to give a directory away")
			} else if err != nil {
				t.Fatal(err)
			}
			if err := makeProxyDir(state); err == nil || !strings.Contains(err.Error(), proxyDir(state)) {
				t.Errorf("%v", err)
			}
		})
	}
}

// mounted calls do in a mount namespace where the state directory at the second path is the one at
// the first, mounted as in the proxy's container: read-only, and the proxy's directory in it
// read-write.
func mounted(t *testing.T, do func(host, container string) error) error {
	t.Helper()
	host, container := filepath.Join(t.TempDir(), "host"), t.TempDir()
	if err := os.MkdirAll(proxyDir(host), 0o755); err != nil {
		t.Fatal(err)
	}
	failed := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlock: the thread has a mount namespace of its own, and ends
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
	err := <-failed
	if errors.Is(err, unix.EPERM) {
		t.Skip("it takes root to mount")
	}
	return err
}

// TestProxyWritesItsOwnDirectoryOnly has the records be mounted read-only.
func TestProxyWritesItsOwnDirectoryOnly(t *testing.T) {
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

// TestProxyEndsWhoseStateDirectoryWasRemovedUnderAMount has its container be started again, with
// mounts of what is there then.
func TestProxyEndsWhoseStateDirectoryWasRemovedUnderAMount(t *testing.T) {
	for name, remove := range map[string]func(host string) error{
		"all of it":                 os.RemoveAll,
		"all of it, and made again": func(host string) error { return errors.Join(os.RemoveAll(host), os.MkdirAll(proxyDir(host), 0o755)) },
		"the proxy's":               func(host string) error { return os.Remove(proxyDir(host)) },
		"the proxy's, and made again": func(host string) error {
			return errors.Join(os.Remove(proxyDir(host)), os.Mkdir(proxyDir(host), 0o755))
		},
		"the proxy's, by another name": func(host string) error {
			return errors.Join(os.Rename(proxyDir(host), host+".other"), os.Remove(host+".other"))
		},
	} {
		t.Run(name, func(t *testing.T) {
			err := mounted(t, func(host, container string) error {
				removed := make(chan error)
				go func() { removed <- remove(host) }() // by the host: the mounts are not in its namespace
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

// TestStateDirectoryWithoutAMountMayComeAndGo is a proxy that runs without a container: it makes
// nothing that an uninstall has removed.
func TestStateDirectoryWithoutAMountMayComeAndGo(t *testing.T) {
	state := filepath.Join(t.TempDir(), "state")
	if err := checkMounted(state); err != nil {
		t.Errorf("one that is not there: %v", err)
	}
	if _, err := os.Stat(state); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it was made: %v", err)
	}
	if err := os.Mkdir(state, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := checkMounted(state); err != nil {
		t.Errorf("one that is there: %v", err)
	}
	if info, err := os.Stat(proxyDir(state)); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the proxy's directory: %v, %v", info, err)
	}
}
