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
)

// errChanged is the error of a file that somebody else wrote since it was read.
var errChanged = errors.New("changed meanwhile")

// replace puts a text in the place of a file that was read before, with its mode and owner. Runtimes see the one or the other, never a
// part, and no name that they would read: containerd takes a file anew when it is renamed into place. Behind a symbolic link the file that
// it leads to is replaced.
func replace(f *file, text []byte) error {
	path, err := filepath.EvalSymlinks(f.path)
	if err != nil {
		return err
	}
	return write(path, f.info, text, func() error {
		now, err := os.Stat(path)
		if err != nil {
			return err
		}
		if !os.SameFile(now, f.info) || !now.ModTime().Equal(f.info.ModTime()) || now.Size() != f.info.Size() {
			return fmt.Errorf("%s: %w", f.path, errChanged)
		}
		return nil
	})
}

// write makes the file with this text and the mode and owner of like. The check comes last before it is renamed into place.
func write(path string, like fs.FileInfo, text []byte, check func() error) error {
	pending, err := renameio.NewPendingFile(path, renameio.WithTempDir(filepath.Dir(path)), renameio.WithStaticPermissions(like.Mode().Perm()))
	if err != nil {
		return err
	}
	defer pending.Cleanup()
	if _, err := pending.Write(text); err != nil {
		return err
	}
	if owner, ok := like.Sys().(*syscall.Stat_t); ok {
		if err := pending.Chown(int(owner.Uid), int(owner.Gid)); err != nil {
			return err
		}
	}
	if err := check(); err != nil {
		return err
	}
	if err := pending.CloseAtomicallyReplace(); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
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
