package attachment

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// List returns all valid records, by file name. The error joins those of the files that are not
// valid records. If a file cannot be read, the list is nil: the set of records is unknown then.
func (d Dir) List() ([]*Record, error) {
	s := new(Snapshot)
	if err := d.readRecords(s); err != nil {
		return nil, err
	}
	return s.Records, s.Invalid
}

// Snapshot is the content of the directory at one time.
type Snapshot struct {
	// Records are the valid records, by file name.
	Records []*Record
	// Invalid joins the errors of the files that are not valid records.
	Invalid error

	inodes  map[uint64]bool // of all files that can be records
	repairs []repair
}

// repair is a change that makes addresses and records agree. It is needed after a process was
// killed during Put or Delete, and after files were removed by hand.
type repair struct {
	object string
	do     func() error
}

// Read returns a snapshot. An error means that the set of records is unknown.
func (d Dir) Read() (*Snapshot, error) {
	s := new(Snapshot)
	if err := d.readRecords(s); err != nil {
		return nil, err
	}
	return s, d.readLinks(s)
}

// Repairs names what Repair would do.
func (s *Snapshot) Repairs() []string {
	var objects []string
	for _, r := range s.repairs {
		objects = append(objects, r.object)
	}
	return objects
}

// Repair removes temporary files and addresses without a record, and links each record's addresses
// that have no holder. The caller holds the exclusive lock since before Read.
func (s *Snapshot) Repair() error {
	for _, r := range s.repairs {
		if err := r.do(); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("%s: %w", r.object, err)
		}
	}
	return nil
}

func (d Dir) readRecords(s *Snapshot) error {
	entries, err := os.ReadDir(d.records())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	s.inodes = make(map[uint64]bool)
	if err == nil {
		s.Records = []*Record{} // not nil: the set is known
	}
	var invalid []error
	for _, e := range entries {
		path := filepath.Join(d.records(), e.Name())
		if s.removesTemporary(path, e) {
			continue
		}
		if info, err := e.Info(); err == nil && !e.IsDir() {
			s.inodes[inode(info)] = true
		}
		if filepath.Ext(path) != ".json" {
			continue
		}
		r, _, err := read(path)
		_, isReadError := errors.AsType[*fs.PathError](err)
		switch {
		case errors.Is(err, fs.ErrNotExist): // removed since ReadDir
		case isReadError:
			return err
		case err != nil:
			invalid = append(invalid, err)
		case e.Name() != r.ID()+".json": // no change of the attachment would find it
			invalid = append(invalid, fmt.Errorf("attachment record %s is of %s", e.Name(), r.ID()))
		default:
			s.Records = append(s.Records, r)
		}
	}
	s.Invalid = errors.Join(invalid...)
	return nil
}

// readLinks compares the addresses with the records that are read.
func (d Dir) readLinks(s *Snapshot) error {
	entries, err := os.ReadDir(d.byIP())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	isHeld := make(map[string]bool)
	for _, e := range entries {
		path := filepath.Join(d.byIP(), e.Name())
		if e.IsDir() {
			continue
		}
		info, err := e.Info()
		switch {
		case err != nil: // removed since ReadDir
		case s.inodes[inode(info)]:
			isHeld[e.Name()] = true
		default:
			s.repairs = append(s.repairs, repair{"address without a record " + path, func() error { return os.Remove(path) }})
		}
	}
	for _, r := range s.Records {
		for _, ip := range r.IPs {
			if isHeld[ip.String()] {
				continue
			}
			isHeld[ip.String()] = true
			s.repairs = append(s.repairs, repair{"address of " + r.ID() + " " + d.ipFile(ip), func() error {
				return errors.Join(os.MkdirAll(d.byIP(), 0o755), d.link(d.recordFile(r.ContainerID, r.IfName), ip))
			}})
		}
	}
	return nil
}

// removesTemporary reports whether a file is a temporary one, which a repair removes.
func (s *Snapshot) removesTemporary(path string, e fs.DirEntry) bool {
	if e.IsDir() || !strings.HasPrefix(e.Name(), ".") {
		return false
	}
	s.repairs = append(s.repairs, repair{"temporary file " + path, func() error { return os.Remove(path) }})
	return true
}

func inode(info fs.FileInfo) uint64 { return info.Sys().(*syscall.Stat_t).Ino }
