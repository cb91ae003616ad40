package attachment

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// Index answers who holds an address, at each call as the directory says at that moment: a lookup asks the kernel whether
// the address's entry is still the file that was read before, so no record is believed a moment longer than it stands, and
// a steady one costs one system call. It asks by the whole path, because the directory itself may be another one by now.
type Index struct {
	dir Dir

	mu    sync.RWMutex
	first *os.File // the directory of addresses when it was first there, open so that its inode is not reused; nil before
	read  map[netip.Addr]readRecord
}

type readRecord struct {
	path   string
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

// ErrNoRecords is the error of a lookup that finds no entry after the records' directory was removed, whether or not another
// one is there since. The plugin never removes it, so the pods whose records were in it may still be there, with their rules.
var ErrNoRecords = errors.New("the directory of the records was removed")

// Holder is the record of the attachment that holds ip now, or nil where none does. The record is shared: it must not be
// changed. An error means that who holds the address is not known: there is an entry but it cannot be read, or it wraps
// ErrNoRecords.
func (x *Index) Holder(ip netip.Addr) (*Record, error) {
	x.mu.RLock()
	known, ok := x.read[ip]
	x.mu.RUnlock()
	if ok {
		var st unix.Stat_t
		if err := unix.Lstat(known.path, &st); err == nil && known.id == idOf(&st) {
			return known.record, nil
		}
		x.forget(ip)
	}
	return x.load(ip)
}

func (x *Index) load(ip netip.Addr) (*Record, error) {
	path := x.dir.ipFile(ip)
	f, err := open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, x.absent()
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	// The identity is that of the very file that is read, before it is read: a rename in between shows at the next call.
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, &fs.PathError{Op: "fstat", Path: path, Err: err}
	}
	record, err := readFrom(f)
	if err == nil && !slices.Contains(record.IPs, ip) {
		err = fmt.Errorf("the record of %s does not list the address", record.ID())
	}
	if err != nil {
		return nil, &fs.PathError{Op: "read", Path: path, Err: err}
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if len(x.read) >= maxIndex {
		clear(x.read)
	}
	if x.first == nil {
		x.first, _ = os.Open(x.dir.byIP())
	}
	x.read[ip] = readRecord{path: path, id: idOf(&st), record: record}
	return record, nil
}

// absent returns nil if the lack of an entry means that no attachment holds the address.
func (x *Index) absent() error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.first == nil {
		// Without a directory, no plugin has ever attached a pod by it.
		f, err := os.Open(x.dir.byIP())
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		x.first = f
		return err
	}
	first, err := x.first.Stat()
	now, gone := os.Stat(x.dir.byIP())
	if err != nil || gone != nil || !os.SameFile(first, now) {
		return fmt.Errorf("%w: %s", ErrNoRecords, x.dir.byIP())
	}
	return nil
}

func (x *Index) forget(ip netip.Addr) {
	x.mu.Lock()
	delete(x.read, ip)
	x.mu.Unlock()
}

func idOf(st *unix.Stat_t) fileID {
	return fileID{dev: uint64(st.Dev), ino: st.Ino, ctime: st.Ctim, size: st.Size}
}
