package conflist

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"
)

// replace atomically replaces a configuration that was read before, and keeps its mode and owner.
// If its path is a symbolic link, it replaces the file that the link points to.
//
// replace exchanges the new file with the old one, and exchanges them back if the old one is not
// the file that was read: another program can write between a check and a rename. The error then
// wraps ErrUnsettled, and the other program's file stays.
func replace(c *config, text []byte) error {
	path, err := filepath.EvalSymlinks(c.path)
	if err != nil {
		return err
	}
	pending, err := prepare(path, c.info, text)
	if err != nil {
		return err
	}
	defer pending.Cleanup()
	check := func(path string) error {
		now, err := os.Stat(path)
		if err == nil && !isUnchanged(c.info, now) {
			err = fmt.Errorf("%s: %w", c.path, ErrUnsettled)
		}
		return err
	}
	exchange := func() error {
		return unix.Renameat2(unix.AT_FDCWD, pending.Name(), unix.AT_FDCWD, path, unix.RENAME_EXCHANGE)
	}
	if err := check(path); err != nil {
		return err
	}
	if err := exchange(); errors.Is(err, unix.EINVAL) {
		return pending.CloseAtomicallyReplace() // ZFS before 2.2 has no RENAME_EXCHANGE
	} else if err != nil {
		return err
	}
	if err := check(pending.Name()); err != nil {
		return errors.Join(err, exchange())
	}
	return nil
}

// isUnchanged reports whether two results of stat are of the same file with the same content.
func isUnchanged(a, b fs.FileInfo) bool {
	return os.SameFile(a, b) && a.ModTime().Equal(b.ModTime()) && a.Size() == b.Size() && a.Mode() == b.Mode()
}

// prepare writes a text to a temporary file next to path, with the mode and owner of another file.
func prepare(path string, like fs.FileInfo, text []byte) (*renameio.PendingFile, error) {
	pending, err := renameio.NewPendingFile(path, renameio.WithTempDir(filepath.Dir(path)), renameio.WithStaticPermissions(like.Mode().Perm()))
	if err != nil {
		return nil, err
	}
	_, writeErr := pending.Write(text)
	owner := like.Sys().(*syscall.Stat_t)
	ownerErr := pending.Chown(int(owner.Uid), int(owner.Gid))
	if errors.Is(ownerErr, unix.EPERM) {
		ownerErr = nil // the file is still readable by the runtime, which is root
	}
	if err := errors.Join(writeErr, ownerErr, pending.Sync()); err != nil {
		pending.Cleanup()
		return nil, err
	}
	return pending, nil
}

// removeStale removes the temporary files of agents that were killed while they wrote to path.
func removeStale(path string, now time.Time) {
	files, _ := filepath.Glob(filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+"[0-9]*"))
	for _, file := range files {
		if info, err := os.Lstat(file); err == nil && now.Sub(info.ModTime()) > time.Minute {
			os.Remove(file)
		}
	}
}
