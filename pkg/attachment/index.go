package attachment

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// Index answers who holds an address, at each call as the directory says at that moment: a lookup asks the kernel whether
// the address's entry is still the file that was read before, so no record is believed a moment longer than it stands, and
// a steady one costs one system call.
type Index struct {
	dir Dir

	mu   sync.RWMutex
	read map[netip.Addr]readRecord
}

type readRecord struct {
	file   string
	id     fileID
	record *Record
}

// fileID tells one version of an entry from the next: every Put makes a new inode, and its change time keeps a reused
// inode number apart.
type fileID struct {
	dev, ino uint64
	ctime    unix.Timespec
	size     int64
}

// maxIndex bounds what is remembered. Far more than the pods of a node: over it, what was read is forgotten at once.
const maxIndex = 8192

// NewIndex is an index over the records of a state directory, which need not exist yet.
func NewIndex(d Dir) *Index { return &Index{dir: d, read: make(map[netip.Addr]readRecord)} }

// Holder is the record of the attachment that holds ip now, or nil where none does. The record is shared: it must not be
// changed. An error means that there is an entry but it cannot be read: who holds the address is not known.
func (x *Index) Holder(ip netip.Addr) (*Record, error) {
	x.mu.RLock()
	known, ok := x.read[ip]
	x.mu.RUnlock()
	if !ok {
		known.file = filepath.Join(x.dir.byIP(), ip.String())
	}
	var st unix.Stat_t
	if err := unix.Lstat(known.file, &st); err != nil {
		if ok {
			x.forget(ip)
		}
		if errors.Is(err, unix.ENOENT) {
			return nil, nil
		}
		return nil, &fs.PathError{Op: "lstat", Path: known.file, Err: err}
	}
	if ok && known.id == idOf(&st) {
		return known.record, nil
	}
	return x.load(ip, known.file)
}

func (x *Index) load(ip netip.Addr, file string) (*Record, error) {
	f, err := os.OpenFile(file, os.O_RDONLY|syscall.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		x.forget(ip)
		return nil, nil
	}
	if err != nil {
		x.forget(ip)
		return nil, err
	}
	defer f.Close()
	// The identity is that of the very file that is read, before it is read: a rename in between shows at the next call.
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, &fs.PathError{Op: "fstat", Path: file, Err: err}
	}
	record, err := readFrom(f)
	if err == nil && !slices.Contains(record.IPs, ip) {
		err = fmt.Errorf("the record of %s does not list the address", record.ID())
	}
	if err != nil {
		x.forget(ip)
		return nil, &fs.PathError{Op: "read", Path: file, Err: err}
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if len(x.read) >= maxIndex {
		clear(x.read)
	}
	x.read[ip] = readRecord{file: file, id: idOf(&st), record: record}
	return record, nil
}

func (x *Index) forget(ip netip.Addr) {
	x.mu.Lock()
	delete(x.read, ip)
	x.mu.Unlock()
}

func idOf(st *unix.Stat_t) fileID {
	return fileID{dev: uint64(st.Dev), ino: st.Ino, ctime: st.Ctim, size: st.Size}
}
