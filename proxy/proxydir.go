package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/imds"
)

// proxyDir returns the directory that the proxy writes: its unix sockets and the key of session
// tokens. The rest of the state directory belongs to the plugin and the agent and may be mounted
// read-only.
func proxyDir(stateDir string) string { return filepath.Join(stateDir, "proxy") }

// handoverSocket returns the path of the unix socket at which a proxy hands over.
func handoverSocket(stateDir string) string {
	return filepath.Join(proxyDir(stateDir), "handover.sock")
}

// makeProxyDir makes the proxy's directory with mode 0700. The kubelet makes the directory of a
// hostPath volume with mode 0755. It is an error if the path is a symbolic link, a file, or another
// user's.
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

// sessionKey returns the key of session tokens. It is a file of the proxy's directory: tokens
// outlive the process. If the file cannot be used, the tokens are valid for the lifetime of the
// process.
func sessionKey(o *options, log *slog.Logger) []byte {
	key, err := imds.LoadKey(filepath.Join(proxyDir(o.stateDir), "session.key"))
	if err != nil {
		log.Warn("session tokens will not outlive this process", "error", err)
		return imds.NewKey()
	}
	return key
}

// errRemoved is the error of a state directory that was removed while it is mounted in a container.
// The mount still shows the removed directory, not one that is made at the same path later.
var errRemoved = errors.New("the state directory was removed under this process, which sees no new records: " +
	"the process ends, and must be started again with the new directory")

// watchStateDir returns an error of checkMounted, or nil when ctx ends.
func watchStateDir(ctx context.Context, stateDir string) error {
	tick := time.NewTicker(5 * time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if err := checkMounted(stateDir); err != nil {
			return err
		}
	}
}

// checkMounted returns errRemoved if the state directory or the proxy's directory was removed while
// it is mounted. Without a mount, a new directory at the path is visible: checkMounted makes the
// proxy's.
func checkMounted(stateDir string) error {
	dir := proxyDir(stateDir)
	var st unix.Stat_t
	if err := unix.Stat(stateDir, &st); err == nil && st.Nlink == 0 {
		return fmt.Errorf("%s: %w", stateDir, errRemoved)
	}
	// Removal of the proxy's directory unmounts it. Its path then leads to the file system of the
	// state directory, which is mounted read-only.
	err := unix.Mkdir(dir, 0o700)
	if errors.Is(err, unix.EEXIST) {
		err = unix.Access(dir, unix.W_OK)
	}
	if errors.Is(err, unix.EROFS) {
		return fmt.Errorf("%s: %w", dir, errRemoved)
	}
	return nil
}
