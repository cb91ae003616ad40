package attachment

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// Index answers who holds an address, at each call as the directory says at that moment: a lookup asks the kernel whether
// the address's entry is still the file that was read before, so no record is believed a moment longer than it stands, and
// a steady one costs one system call.
type Index struct {
	dir Dir

	mu   sync.RWMutex
	byIP *os.File // the directory, so that a lookup walks no path; nil until it exists
	read map[netip.Addr]readRecord
}

type readRecord struct {
	name   string // the address as a file name
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
	dir := x.byIP
	x.mu.RUnlock()
	if ok {
		var st unix.Stat_t
		err := unix.Fstatat(int(dir.Fd()), known.name, &st, unix.AT_SYMLINK_NOFOLLOW)
		runtime.KeepAlive(dir) // its descriptor is open for as long as it is in reach
		if err == nil && known.id == idOf(&st) {
			return known.record, nil
		}
		x.forget(ip)
	}
	return x.load(ip)
}

// load reads the entry by its path, and so from the directory that has that path now: one that was removed and made again
// since is another one.
func (x *Index) load(ip netip.Addr) (*Record, error) {
	dir, err := os.Open(x.dir.byIP())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	name := ip.String()
	f, err := openAt(dir, name)
	if err != nil {
		dir.Close()
		if errors.Is(err, fs.ErrNotExist) {
			return nil, nil
		}
		return nil, err
	}
	defer f.Close()
	// The identity is that of the very file that is read, before it is read: a rename in between shows at the next call.
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		dir.Close()
		return nil, &fs.PathError{Op: "fstat", Path: f.Name(), Err: err}
	}
	record, err := readFrom(f)
	if err == nil && !slices.Contains(record.IPs, ip) {
		err = fmt.Errorf("the record of %s does not list the address", record.ID())
	}
	if err != nil {
		dir.Close()
		return nil, &fs.PathError{Op: "read", Path: f.Name(), Err: err}
	}
	x.remember(dir, ip, readRecord{name: name, id: idOf(&st), record: record})
	return record, nil
}

func openAt(dir *os.File, name string) (*os.File, error) {
	path := filepath.Join(dir.Name(), name)
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "openat", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// remember keeps what was read from dir. What was read from another directory of the same path is worth nothing any more.
func (x *Index) remember(dir *os.File, ip netip.Addr, r readRecord) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if !sameDir(x.byIP, dir) || len(x.read) >= maxIndex {
		clear(x.read)
		// The former one is closed when the last lookup that uses it lets go of it.
		x.byIP = dir
	} else {
		dir.Close()
	}
	x.read[ip] = r
}

func sameDir(a, b *os.File) bool {
	if a == nil {
		return false
	}
	ia, erra := a.Stat()
	ib, errb := b.Stat()
	return erra == nil && errb == nil && os.SameFile(ia, ib)
}

func (x *Index) forget(ip netip.Addr) {
	x.mu.Lock()
	delete(x.read, ip)
	x.mu.Unlock()
}

func idOf(st *unix.Stat_t) fileID {
	return fileID{dev: uint64(st.Dev), ino: st.Ino, ctime: st.Ctim, size: st.Size}
}
