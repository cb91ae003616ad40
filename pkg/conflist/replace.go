package conflist

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"syscall"
	"time"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"
)

// errChanged is the error of a file that another program wrote since it was read.
var errChanged = errors.New("changed since it was read")

// replace atomically replaces a file that was read before, and keeps its mode and owner. If the path is
// a symbolic link, it replaces the file that the link points to.
//
// replace exchanges the new file with the old one, and exchanges them back if the old one is not the
// file that was read: another program can write between a check and a rename. The error then wraps
// errChanged, and the other program's file stays.
func replace(f *file, text []byte) error {
	path, err := filepath.EvalSymlinks(f.path)
	if err != nil {
		return err
	}
	pending, err := prepare(path, f.info, text)
	if err != nil {
		return err
	}
	defer pending.Cleanup()
	newFile, err := pending.Stat()
	if err != nil {
		return err
	}
	check := func(path string) error {
		now, err := os.Stat(path)
		if err != nil {
			return err
		}
		if !os.SameFile(now, f.info) || !now.ModTime().Equal(f.info.ModTime()) || now.Size() != f.info.Size() {
			return fmt.Errorf("%s: %w", f.path, errChanged)
		}
		return nil
	}
	if err := check(path); err != nil {
		return err
	}
	exchange := func() error {
		return unix.Renameat2(unix.AT_FDCWD, pending.Name(), unix.AT_FDCWD, path, unix.RENAME_EXCHANGE)
	}
	switch err := exchange(); {
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOSYS):
		// The file system does not support RENAME_EXCHANGE.
		if err := os.Rename(pending.Name(), path); err != nil {
			return err
		}
	case err != nil:
		return err
	default:
		if err := check(pending.Name()); err != nil {
			// The other program may write once more before its file is back. The exchange is repeated
			// until the file that Cleanup removes is the new one.
			for range 5 {
				if exchangeErr := exchange(); exchangeErr != nil {
					return errors.Join(err, exchangeErr)
				}
				if info, statErr := os.Stat(pending.Name()); statErr != nil || os.SameFile(info, newFile) {
					break
				}
			}
			return err
		}
	}
	return syncDir(filepath.Dir(path))
}

// create creates a file. The error wraps errChanged if the file exists.
func create(path string, like fs.FileInfo, text []byte) error {
	pending, err := prepare(path, like, text)
	if err != nil {
		return err
	}
	defer pending.Cleanup()
	if err := os.Link(pending.Name(), path); errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%s: %w", path, errChanged)
	} else if err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// prepare writes a text to a temporary file next to path, with the mode and owner of another file.
func prepare(path string, like fs.FileInfo, text []byte) (*renameio.PendingFile, error) {
	pending, err := renameio.NewPendingFile(path, renameio.WithTempDir(filepath.Dir(path)), renameio.WithStaticPermissions(like.Mode().Perm()))
	if err != nil {
		return nil, err
	}
	_, err = pending.Write(text)
	if owner, ok := like.Sys().(*syscall.Stat_t); ok && err == nil && (int(owner.Uid) != os.Geteuid() || int(owner.Gid) != os.Getegid()) {
		// Without the owner the file is still readable by the runtime, which is root.
		if err = pending.Chown(int(owner.Uid), int(owner.Gid)); errors.Is(err, unix.EPERM) {
			err = nil
		}
	}
	if err == nil {
		err = pending.Sync()
	}
	if err != nil {
		pending.Cleanup()
		return nil, err
	}
	return pending, nil
}

// syncDir makes renames in a directory survive a power failure.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// temporaryName matches the names of renameio's temporary files.
var temporaryName = regexp.MustCompile(`^\.(.+?)[0-9]+$`)

// removeStale removes temporary files of agents that were killed while they wrote.
func removeStale(dir string, now time.Time, isOurs func(name string) bool) {
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		match := temporaryName.FindStringSubmatch(e.Name())
		if match == nil || !isOurs(match[1]) || !e.Type().IsRegular() {
			continue
		}
		if info, err := e.Info(); err == nil && now.Sub(info.ModTime()) > time.Minute {
			os.Remove(filepath.Join(dir, e.Name()))
		}
	}
}
