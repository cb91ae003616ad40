package conflist

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/google/renameio/v2"
)

// Binary is a plugin's binary to install.
type Binary struct {
	Name   string // of the file, which is the plugin's type
	Source io.ReaderAt
	Size   int64

	verified os.FileInfo // of the installed file when it last had the same content
}

// install writes the binary to the directory unless an identical file is there, and reports whether it
// did. A running plugin keeps the file that it was started from.
func (b *Binary) install(dir string) (bool, error) {
	path := filepath.Join(dir, b.Name)
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return false, err
	case b.verified != nil && isUnchanged(info, b.verified):
		return false, nil
	default:
		identical, err := b.isIdentical(path, info)
		if err != nil {
			return false, err
		}
		if identical {
			b.verified = info
			return false, nil
		}
	}
	pending, err := renameio.NewPendingFile(path, renameio.WithTempDir(dir), renameio.WithStaticPermissions(0o755))
	if err != nil {
		return false, err
	}
	defer pending.Cleanup()
	if _, err := io.Copy(pending, b.content()); err != nil {
		return false, err
	}
	if err := errors.Join(pending.CloseAtomicallyReplace(), syncDir(dir)); err != nil {
		return false, err
	}
	b.verified, err = os.Stat(path)
	return true, err
}

func (b *Binary) content() io.Reader { return io.NewSectionReader(b.Source, 0, b.Size) }

// isIdentical reports whether a file has the binary's content and mode.
func (b *Binary) isIdentical(path string, info os.FileInfo) (bool, error) {
	if !info.Mode().IsRegular() {
		return false, fmt.Errorf("%s is not a regular file", path)
	}
	if info.Size() != b.Size || info.Mode().Perm() != 0o755 {
		return false, nil
	}
	f, err := os.Open(path)
	if err != nil {
		return false, err
	}
	defer f.Close()
	got, want := sha256.New(), sha256.New()
	_, errGot := io.Copy(got, f)
	_, errWant := io.Copy(want, b.content())
	return bytes.Equal(got.Sum(nil), want.Sum(nil)), errors.Join(errGot, errWant)
}

// isUnchanged reports whether two results of stat are of the same file with the same content.
func isUnchanged(a, b os.FileInfo) bool {
	return os.SameFile(a, b) && a.ModTime().Equal(b.ModTime()) && a.Size() == b.Size() && a.Mode() == b.Mode() &&
		a.Sys().(*syscall.Stat_t).Ctim == b.Sys().(*syscall.Stat_t).Ctim
}
