package conflist

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/google/renameio/v2"
)

// Binary is a program that is to be in the runtime's plugin directory.
type Binary struct {
	// Name is the file's there: the plugin's type.
	Name string
	// Source is the program, from its beginning to its size.
	Source io.ReaderAt
	Size   int64

	known os.FileInfo // the file that was seen to be the program
}

// install puts the program into the directory where another one is there, or none, and tells whether it did. A plugin that runs keeps the
// file that it was started from.
func (b *Binary) install(dir string) (bool, error) {
	path := filepath.Join(dir, b.Name)
	there, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return false, err
	case b.known != nil && unchanged(there, b.known):
		return false, nil
	default:
		same, err := b.is(path, there)
		if err != nil {
			return false, err
		}
		if same {
			b.known = there
			return false, nil
		}
	}
	pending, err := renameio.NewPendingFile(path, renameio.WithTempDir(dir), renameio.WithStaticPermissions(0o755))
	if err != nil {
		return false, err
	}
	defer pending.Cleanup()
	if _, err := io.Copy(pending, io.NewSectionReader(b.Source, 0, b.Size)); err != nil {
		return false, err
	}
	if err := pending.CloseAtomicallyReplace(); err != nil {
		return false, err
	}
	if err := syncDir(dir); err != nil {
		return false, err
	}
	b.known, err = os.Stat(path)
	return true, err
}

func unchanged(now, before os.FileInfo) bool {
	return os.SameFile(now, before) && now.ModTime().Equal(before.ModTime()) && now.Size() == before.Size() && now.Mode() == before.Mode() && changeTime(now) == changeTime(before)
}

func changeTime(info os.FileInfo) syscall.Timespec {
	if stat, ok := info.Sys().(*syscall.Stat_t); ok {
		return stat.Ctim
	}
	return syscall.Timespec{}
}

// is tells whether a file is the program, and one that can be run.
func (b *Binary) is(path string, info os.FileInfo) (bool, error) {
	if !info.Mode().IsRegular() {
		return false, fmt.Errorf("%s is no file", path)
	}
	if info.Size() != b.Size || info.Mode().Perm() != 0o755 {
		return false, nil
	}
	f, err := os.Open(path)
	if err != nil {
		return false, err
	}
	defer f.Close()
	const chunk = 1 << 16
	x, y := make([]byte, chunk), make([]byte, chunk)
	for at := int64(0); at < b.Size; at += chunk {
		n := min(chunk, b.Size-at)
		if _, err := f.ReadAt(x[:n], at); err != nil {
			return false, err
		}
		if _, err := b.Source.ReadAt(y[:n], at); err != nil {
			return false, err
		}
		if !bytes.Equal(x[:n], y[:n]) {
			return false, nil
		}
	}
	return true, nil
}
