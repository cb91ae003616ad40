package conflist

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"
)

// TestReplaceKeepsConcurrentWrites has a primary CNI write the configuration while it is replaced.
func TestReplaceKeepsConcurrentWrites(t *testing.T) {
	for name, write := range map[string]func(path, text string) error{
		"renamed": func(path, text string) error {
			return errors.Join(os.WriteFile(path+".tmp", []byte(text), 0o600), os.Rename(path+".tmp", path))
		},
		"removed and created": func(path, text string) error {
			return errors.Join(os.Remove(path), os.WriteFile(path, []byte(text), 0o600))
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, nil)
			c := &config{path: n.path("10-a.conflist")}
			concurrent := 0
			for i := range 300 {
				n.write("10-a.conflist", chain("a", "bridge"))
				newer := chain("a", "bridge", fmt.Sprint("newer-", i))
				n.must(c.read())
				var writer sync.WaitGroup
				writer.Go(func() {
					if err := write(c.path, newer); err != nil {
						t.Error(err)
					}
				})
				err := replace(c, []byte(chain("a", "bridge", plugin)))
				writer.Wait()
				if errors.Is(err, ErrUnsettled) || errors.Is(err, fs.ErrNotExist) {
					concurrent++
				} else if err != nil {
					t.Fatal(err)
				}
				if text, err := os.ReadFile(c.path); err != nil || string(text) != newer {
					t.Fatalf("%d: the file has %q, %v", i, text, err)
				}
				if entries, _ := os.ReadDir(n.ConfDir); len(entries) != 1 {
					t.Fatalf("files %v", entries)
				}
			}
			if concurrent == 0 {
				t.Error("no write was concurrent")
			}
		})
	}
}

// TestExchangeKeepsTheLastOfManyWrites has a primary CNI rename its configuration before each of
// some exchanges.
func TestExchangeKeepsTheLastOfManyWrites(t *testing.T) {
	for writes := range 5 {
		dir := t.TempDir()
		path, pending := filepath.Join(dir, "10-a.conflist"), filepath.Join(dir, "pending")
		write := func(path, text string) {
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		write(path, "read before")
		write(pending, "new")
		read, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		err = exchange(pending, path, read, func(a, b string) error {
			if n < writes {
				n++
				write(path+".tmp", fmt.Sprint("written ", n))
				if err := os.Rename(path+".tmp", path); err != nil {
					return err
				}
			}
			return renameExchange(a, b)
		})
		want := "new"
		if writes > 0 {
			want = fmt.Sprint("written ", writes)
		}
		if text, _ := os.ReadFile(path); string(text) != want || errors.Is(err, ErrUnsettled) != (writes > 0) {
			t.Errorf("%d writes: the file has %q, %v", writes, text, err)
		}
	}
}

// foreign is the information of a file that another user owns.
type foreign struct{ fs.FileInfo }

func (foreign) Mode() fs.FileMode { return 0o640 }
func (foreign) Sys() any          { return &syscall.Stat_t{Uid: 12, Gid: 34} }

// TestReplacementHasTheOwner expects the owner of the replaced file if the kernel permits it, and
// else that the file is written all the same.
func TestReplacementHasTheOwner(t *testing.T) {
	pending, err := prepare(filepath.Join(t.TempDir(), "10-a.conflist"), foreign{}, []byte("{}"))
	if err != nil {
		t.Fatal(err)
	}
	defer pending.Cleanup()
	info, err := pending.Stat()
	if err != nil {
		t.Fatal(err)
	}
	uid, gid := 12, 34
	if os.Geteuid() != 0 {
		uid, gid = os.Geteuid(), os.Getegid()
	}
	if owner := info.Sys().(*syscall.Stat_t); int(owner.Uid) != uid || int(owner.Gid) != gid || info.Mode() != 0o640 {
		t.Errorf("owner %d:%d, mode %v", owner.Uid, owner.Gid, info.Mode())
	}
}

func TestModeStaysAndSymbolicLinkIsFollowed(t *testing.T) {
	n := newNode(t, nil)
	target := filepath.Join(t.TempDir(), "target.conflist")
	n.must(os.WriteFile(target, []byte(chain("a", "bridge")), 0o604))
	n.must(os.Symlink(target, n.path("10-a.conflist")))
	if _, err := n.Install(); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Lstat(target); err != nil || info.Mode() != 0o604 {
		t.Errorf("the target: %v, %v", info, err)
	}
	if link, err := os.Lstat(n.path("10-a.conflist")); err != nil || link.Mode().Type() != fs.ModeSymlink {
		t.Errorf("the link: %v, %v", link, err)
	}
	if text, _ := os.ReadFile(target); !Has(text, plugin) {
		t.Errorf("the target has %s", text)
	}
}

// TestTemporaryFilesOfKilledAgentsAreRemoved leaves those that another process may be writing.
func TestTemporaryFilesOfKilledAgentsAreRemoved(t *testing.T) {
	n := newNode(t, map[string]string{"10-a.conflist": chain("a", "bridge")})
	earlier := time.Now().Add(-time.Hour)
	stale := []string{filepath.Join(n.BinDir, "."+plugin+"123"), n.path(".10-a.conflist123")}
	recent := filepath.Join(n.BinDir, "."+plugin+"456")
	for _, path := range append(stale, recent) {
		n.must(os.WriteFile(path, nil, 0o600))
		if path != recent {
			n.must(os.Chtimes(path, earlier, earlier))
		}
	}
	if _, err := n.Install(); err != nil {
		t.Fatal(err)
	}
	for _, path := range stale {
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %v", path, err)
		}
	}
	if _, err := os.Stat(recent); err != nil {
		t.Error(err)
	}
}
