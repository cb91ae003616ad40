package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// proxyDir is the directory that the proxy writes: its sockets and the key of session tokens. The
// rest of the state directory is the plugin's and the agent's, and may be mounted read-only.
func proxyDir(stateDir string) string { return filepath.Join(stateDir, "proxy") }

// makeProxyDir makes the proxy's directory, and closes it to other users: the kubelet makes the
// directory of a hostPath volume with mode 0755. A link, a file and another user's directory are
// refused.
func makeProxyDir(stateDir string) error {
	dir := proxyDir(stateDir)
	if err := os.MkdirAll(stateDir, 0o755); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	info, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	if owner := int(info.Sys().(*syscall.Stat_t).Uid); !info.IsDir() || owner != os.Geteuid() {
		return fmt.Errorf("%s: %s of user %d, not a directory of user %d", dir, info.Mode(), owner, os.Geteuid())
	}
	if info.Mode().Perm() != 0o700 {
		if err := os.Chmod(dir, 0o700); err != nil {
			return err
		}
	}
	if err := unix.Access(dir, unix.W_OK|unix.X_OK); err != nil {
		return &fs.PathError{Op: "write", Path: dir, Err: err}
	}
	return nil
}

// errRemoved is the error of a state directory that was removed while it, or the proxy's directory
// in it, is mounted, as in a container. The mount stays at what was removed: what is made at the
// path later is not seen through it.
var errRemoved = errors.New("the state directory was removed from under this process, which sees no new records: it ends, to be started again with the one that is there now")

// checkMounted returns errRemoved where the state directory or the proxy's directory was removed
// from under a mount. Without mounts both may be made again, and are seen then; the proxy's
// directory is made again here.
func checkMounted(stateDir string) error {
	dir := proxyDir(stateDir)
	var st unix.Stat_t
	if err := unix.Stat(stateDir, &st); err == nil && st.Nlink == 0 {
		return fmt.Errorf("%s: %w", stateDir, errRemoved)
	}
	// Removing the proxy's directory unmounts what was mounted on it. Then the path leads to the file
	// system of the state directory, which is mounted read-only.
	err := unix.Mkdir(dir, 0o700)
	if errors.Is(err, unix.EEXIST) {
		err = unix.Access(dir, unix.W_OK)
	}
	if errors.Is(err, unix.EROFS) {
		return fmt.Errorf("%s: %w", dir, errRemoved)
	}
	return nil
}
