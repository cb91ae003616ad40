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
	if now, err := os.Stat(path); err != nil {
		return err
	} else if !isUnchanged(c.info, now) {
		return fmt.Errorf("%s: %w", c.path, ErrUnsettled)
	}
	err = exchange(pending.Name(), path, c.info, renameExchange)
	if errors.Is(err, unix.EINVAL) {
		return pending.CloseAtomicallyReplace() // ZFS before 2.2 has no RENAME_EXCHANGE
	}
	return err
}

// exchange exchanges two files, if the file at path is still the one that was read. Otherwise it
// exchanges them back. Another program can rename once more between two exchanges, so exchange
// repeats them until the file that leaves path is the one that it put there itself. The other
// program's last file then stays, and the error wraps ErrUnsettled.
func exchange(pending, path string, read fs.FileInfo, rename func(a, b string) error) error {
	expected := read
	for range maxExchanges {
		placed, err := os.Stat(pending)
		if err != nil {
			return err
		}
		if err := rename(pending, path); err != nil {
			return err
		}
		if left, err := os.Stat(pending); err != nil {
			return err
		} else if isUnchanged(expected, left) {
			if expected == read {
				return nil
			}
			break
		}
		expected = placed
	}
	return fmt.Errorf("%s: %w", path, ErrUnsettled)
}

// maxExchanges bounds the exchanges with a program that renames without a pause.
const maxExchanges = 20

func renameExchange(a, b string) error {
	return unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_EXCHANGE)
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
