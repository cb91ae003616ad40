package conflist

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"
)

// errChanged is the error of a file that somebody else wrote since it was read.
var errChanged = errors.New("changed meanwhile")

// replace puts a text in the place of a file that was read before, with its mode and owner. Runtimes see the one or the other, never a
// part, and no name that they would read: containerd takes a file anew when it is renamed into place. Behind a symbolic link the file that
// it leads to is replaced.
//
// The error wraps errChanged where somebody else wrote meanwhile, whose file stays: the two change places, and change back where what comes
// out is not what was read.
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
	ours, err := pending.Stat()
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
		// This file system cannot exchange them.
		if err := os.Rename(pending.Name(), path); err != nil {
			return err
		}
	case err != nil:
		return err
	default:
		if err := check(pending.Name()); err != nil {
			// Somebody may write once more before theirs is back: the newest stays, and what is removed is ours.
			for range 5 {
				if failed := exchange(); failed != nil {
					return errors.Join(err, failed)
				}
				if out, failed := os.Stat(pending.Name()); failed != nil || os.SameFile(out, ours) {
					break
				}
			}
			return err
		}
	}
	return syncDir(filepath.Dir(path))
}

// create makes a file that is not there. The error wraps errChanged where it is by now.
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

// prepare writes a text beside where it is to be, to the disk, with the mode and the owner of another file.
func prepare(path string, like fs.FileInfo, text []byte) (*renameio.PendingFile, error) {
	pending, err := renameio.NewPendingFile(path, renameio.WithTempDir(filepath.Dir(path)), renameio.WithStaticPermissions(like.Mode().Perm()))
	if err != nil {
		return nil, err
	}
	_, err = pending.Write(text)
	if owner, ok := like.Sys().(*syscall.Stat_t); ok && err == nil && (int(owner.Uid) != os.Geteuid() || int(owner.Gid) != os.Getegid()) {
		// One that may not be given away is better than none: a runtime is root.
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

// syncDir has what was renamed outlive a loss of power.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// sweep removes what a process that died left of files that it was writing: renameio's names for them, of these files.
func sweep(dir string, now time.Time, mine func(base string) bool) {
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		name := strings.TrimRight(e.Name(), "0123456789")
		base, hidden := strings.CutPrefix(name, ".")
		if !hidden || name == e.Name() || !mine(base) || !e.Type().IsRegular() {
			continue
		}
		if _, err := strconv.ParseUint(e.Name()[len(name):], 10, 64); err != nil {
			continue
		}
		if info, err := e.Info(); err == nil && now.Sub(info.ModTime()) > time.Minute {
			os.Remove(filepath.Join(dir, e.Name()))
		}
	}
}
