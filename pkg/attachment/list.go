package attachment

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// List returns all valid records, by file name. The error joins those of the files that are not
// valid records, or says that a file cannot be read; then the set of records is unknown.
func (d Dir) List() ([]*Record, error) {
	s, err := d.readRecords()
	if err != nil {
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

	// Repairs names the changes that make addresses and records agree. They are needed after a
	// process was killed during Put or Delete, and after files were removed by hand.
	Repairs []string

	repairs []func() error
	inodes  map[uint64]bool // of the records' files
}

// Read returns a snapshot. An error means that the set of records is unknown.
func (d Dir) Read() (*Snapshot, error) {
	s, err := d.readRecords()
	if err != nil {
		return nil, err
	}
	return s, d.readLinks(s)
}

// Repair removes temporary files and addresses without a record, and links each record's addresses
// that have no holder. The caller holds the exclusive lock since before Read.
func (s *Snapshot) Repair() error {
	var errs []error
	for i, repair := range s.repairs {
		if err := repair(); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("%s: %w", s.Repairs[i], err))
		}
	}
	return errors.Join(errs...)
}

func (d Dir) readRecords() (*Snapshot, error) {
	entries, err := os.ReadDir(d.records())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	s := &Snapshot{inodes: make(map[uint64]bool)}
	var invalid []error
	for _, e := range entries {
		path := filepath.Join(d.records(), e.Name())
		if strings.HasPrefix(e.Name(), ".") {
			s.willRemove("temporary file", path)
		}
		if filepath.Ext(path) != ".json" {
			continue
		}
		if info, err := e.Info(); err == nil {
			s.inodes[stat(info).Ino] = true
		}
		r, err := readRecord(path)
		_, isReadError := errors.AsType[*fs.PathError](err)
		switch {
		case errors.Is(err, fs.ErrNotExist): // removed since ReadDir
		case isReadError:
			return nil, err
		case err != nil:
			invalid = append(invalid, err)
		default:
			s.Records = append(s.Records, r)
		}
	}
	s.Invalid = errors.Join(invalid...)
	return s, nil
}

// readLinks compares the addresses with the records that are read.
func (d Dir) readLinks(s *Snapshot) error {
	entries, err := os.ReadDir(d.byIP())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	isHeld := make(map[string]bool)
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			continue // removed since ReadDir
		}
		if isHeld[e.Name()] = s.inodes[stat(info).Ino]; !isHeld[e.Name()] {
			s.willRemove("address without a record", filepath.Join(d.byIP(), e.Name()))
		}
	}
	for _, r := range s.Records {
		for _, ip := range r.IPs {
			if isHeld[ip.String()] {
				continue
			}
			isHeld[ip.String()] = true
			s.will("address of "+r.ID()+" "+d.ipFile(ip), func() error {
				return errors.Join(os.MkdirAll(d.byIP(), 0o755), d.link(d.recordFile(r.ContainerID, r.IfName), ip))
			})
		}
	}
	return nil
}

func (s *Snapshot) willRemove(what, path string) {
	s.will(what+" "+path, func() error { return os.Remove(path) })
}

func (s *Snapshot) will(name string, repair func() error) {
	s.Repairs, s.repairs = append(s.Repairs, name), append(s.repairs, repair)
}
