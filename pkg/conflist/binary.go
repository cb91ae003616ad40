package conflist

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/google/renameio/v2"
)

// Binary is a plugin's binary to install.
type Binary struct {
	Name   string // of the file, which is the plugin's type
	Source io.ReaderAt
	Size   int64

	verified fs.FileInfo // of the installed file when it last had the same content
}

// install writes the binary to the directory unless an identical file is there, and reports whether
// it did. A running plugin keeps the file that it was started from.
func (b *Binary) install(dir string) (bool, error) {
	path := filepath.Join(dir, b.Name)
	identical, err := b.isInstalled(path)
	if identical || err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	pending, err := renameio.NewPendingFile(path, renameio.WithTempDir(dir), renameio.WithStaticPermissions(0o755))
	if err != nil {
		return false, err
	}
	defer pending.Cleanup()
	if _, err := io.Copy(pending, b.content()); err != nil {
		return false, err
	}
	return true, pending.CloseAtomicallyReplace()
}

func (b *Binary) content() io.Reader { return io.NewSectionReader(b.Source, 0, b.Size) }

// isInstalled reports whether a file has the binary's content and mode. It reads the file only if
// it changed since the last call.
func (b *Binary) isInstalled(path string) (bool, error) {
	f, err := os.Open(path)
	if err != nil {
		return false, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return false, err
	}
	if b.verified != nil && isUnchanged(info, b.verified) {
		return true, nil
	}
	if info.Size() != b.Size || info.Mode() != 0o755 {
		return false, nil
	}
	got, want := sha256.New(), sha256.New()
	_, gotErr := io.Copy(got, f)
	_, wantErr := io.Copy(want, b.content())
	if err := errors.Join(gotErr, wantErr); err != nil || !bytes.Equal(got.Sum(nil), want.Sum(nil)) {
		return false, err
	}
	b.verified = info
	return true, nil
}
