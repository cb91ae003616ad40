package attachment

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// Mend makes whole what a process left that was killed within a change: it removes temporary files, gives a record the
// addresses that it lists and nobody holds, and takes those away that are held by a record that is no more. What it did is
// in the list, a line each. A directory that is not there needs nothing.
func (d Dir) Mend(ctx context.Context) ([]string, error) {
	if !there(d.records()) && !there(d.byIP()) {
		return nil, nil
	}
	if whole, err := d.whole(); err != nil || whole {
		return nil, err // looked at without the lock: nothing to do is the rule
	}
	var did []string
	err := d.locked(ctx, func() (err error) {
		did, err = d.mend()
		return err
	})
	return did, err
}

// state is the two directories, by file.
type state struct {
	temporary []string
	records   map[string]fs.FileInfo // by path
	held      map[string]fs.FileInfo // by path
	inodes    map[uint64]bool        // of the records
}

func (d Dir) look() (*state, error) {
	s := &state{records: make(map[string]fs.FileInfo), held: make(map[string]fs.FileInfo), inodes: make(map[uint64]bool)}
	for dir, into := range map[string]map[string]fs.FileInfo{d.records(): s.records, d.byIP(): s.held} {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		for _, e := range entries {
			path := filepath.Join(dir, e.Name())
			if e.IsDir() {
				continue // nobody's who changes records
			}
			if strings.HasPrefix(e.Name(), ".") {
				s.temporary = append(s.temporary, path)
				continue
			}
			if info, err := e.Info(); err == nil {
				into[path] = info
			}
		}
	}
	for _, info := range s.records {
		s.inodes[inode(info)] = true
	}
	return s, nil
}

// inode tells files of one file system apart.
func inode(info fs.FileInfo) uint64 { return info.Sys().(*syscall.Stat_t).Ino }

// isRecord tells whether an address's entry is one and the same file as a record.
func (s *state) isRecord(held fs.FileInfo) bool { return s.inodes[inode(held)] }

// unheld calls do for each address that a record lists and no entry holds.
func (d Dir) unheld(s *state, do func(record string, r *Record, file string) error) error {
	for path := range s.records {
		r, err := read(path)
		if err != nil {
			continue // List says so
		}
		for _, ip := range r.IPs {
			file := d.ipFile(ip)
			if s.held[file] == nil {
				if err := do(path, r, file); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

func (d Dir) whole() (bool, error) {
	s, err := d.look()
	if err != nil || len(s.temporary) > 0 {
		return false, err
	}
	for _, held := range s.held {
		if !s.isRecord(held) {
			return false, nil
		}
	}
	whole := true
	err = d.unheld(s, func(string, *Record, string) error { whole = false; return nil })
	return whole, err
}

func (d Dir) mend() ([]string, error) {
	s, err := d.look()
	if err != nil {
		return nil, err
	}
	var did []string
	remove := func(path, why string) error {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		delete(s.held, path)
		did = append(did, why+" "+path)
		return nil
	}
	for _, path := range s.temporary {
		if err := remove(path, "temporary file"); err != nil {
			return did, err
		}
	}
	for path, held := range s.held {
		if !s.isRecord(held) {
			if err := remove(path, "address without a record"); err != nil {
				return did, err
			}
		}
	}
	err = d.unheld(s, func(path string, r *Record, file string) error {
		info := s.records[path]
		if err := os.MkdirAll(d.byIP(), 0o755); err != nil {
			return err
		}
		if err := replace(file, func(tmp string) error { return os.Link(path, tmp) }); err != nil {
			return fmt.Errorf("address %s of %s: %w", filepath.Base(file), r.ID(), err)
		}
		s.held[file] = info
		did = append(did, "address of "+r.ID()+" "+file)
		return nil
	})
	return did, err
}
