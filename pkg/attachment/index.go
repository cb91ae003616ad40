package attachment

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"sync"
	"syscall"
)

// Index caches the records of addresses. Each lookup asks the kernel whether the address's entry is
// still the file that was read, so a cached record is never used after a change. A lookup of a
// cached record costs one system call. It uses the whole path, because the directory can be
// replaced.
type Index struct {
	dir Dir

	mu    sync.RWMutex
	first *os.File // the first directory of addresses; open, so its inode is not reused
	read  map[netip.Addr]cachedRecord
}

type cachedRecord struct {
	*Record
	info fs.FileInfo
}

// maxIndex bounds the cache, far above the number of pods of a node. A full cache is emptied.
const maxIndex = 8192

// NewIndex returns an index of a state directory, which need not exist.
func NewIndex(d Dir) *Index { return &Index{dir: d, read: make(map[netip.Addr]cachedRecord)} }

// ErrNoRecords is the error of a lookup that finds no entry after the records' directory was
// removed, whether or not there is another one. The plugin never removes it, so pods whose records
// were in it can still exist, with their rules.
var ErrNoRecords = errors.New("the directory of the records was removed")

// Holder returns the record of the attachment that holds ip, or nil if none does. Callers do not
// change the record. An error means that the holder is unknown: its record cannot be read, or the
// error is ErrNoRecords.
func (x *Index) Holder(ip netip.Addr) (*Record, error) {
	x.mu.RLock()
	cached, ok := x.read[ip]
	x.mu.RUnlock()
	if ok {
		if info, err := os.Lstat(x.dir.ipFile(ip)); err == nil && isUnchanged(info, cached.info) {
			return cached.Record, nil
		}
	}
	record, info, err := x.dir.holder(ip)
	removed := x.checkDirectory()
	if errors.Is(err, fs.ErrNotExist) {
		return nil, removed
	}
	if err != nil {
		return nil, err
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if len(x.read) >= maxIndex {
		clear(x.read)
	}
	x.read[ip] = cachedRecord{record, info}
	return record, nil
}

// isUnchanged reports whether a and b are the same version of a file: each Put makes a new inode,
// and the change time tells a reused inode number.
func isUnchanged(a, b fs.FileInfo) bool {
	return os.SameFile(a, b) && a.Size() == b.Size() && stat(a).Ctim == stat(b).Ctim
}

func stat(info fs.FileInfo) *syscall.Stat_t { return info.Sys().(*syscall.Stat_t) }

// checkDirectory returns nil if a missing entry means that no attachment holds the address.
func (x *Index) checkDirectory() error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.first == nil {
		f, err := os.Open(x.dir.byIP())
		if errors.Is(err, fs.ErrNotExist) {
			return nil // no plugin has attached a pod
		}
		x.first = f
		return err
	}
	first, err := x.first.Stat()
	now, missing := os.Stat(x.dir.byIP())
	if err != nil || missing != nil || !os.SameFile(first, now) {
		return fmt.Errorf("%w: %s", ErrNoRecords, x.dir.byIP())
	}
	return nil
}
