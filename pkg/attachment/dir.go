package attachment

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Dir is the state directory's part that holds the records:
//
//	attachments/<containerID>@<ifName>.json   the record
//	by-ip/<address>                           a hard link to the record of the address's holder
//
// Every change is one rename or one unlink, made under a lock that a process's death releases, so a reader sees the record
// of an address whole or not at all. Nothing is synced to a disk: what the records speak of dies with the kernel.
type Dir struct{ root string }

// In is the records of a state directory; the directory is made by the first Put.
func In(stateDir string) Dir { return Dir{root: stateDir} }

func (d Dir) records() string { return filepath.Join(d.root, "attachments") }
func (d Dir) byIP() string    { return filepath.Join(d.root, "by-ip") }

func (d Dir) recordFile(containerID, ifName string) string {
	return filepath.Join(d.records(), ID(containerID, ifName)+".json")
}

func (d Dir) ipFile(ip netip.Addr) string { return filepath.Join(d.byIP(), ip.String()) }

// Put writes the record and makes it the holder of its IPs, in place of any earlier record of the same attachment. An
// address that another attachment holds changes hands; tearing down what that one programmed is the caller's, before. A
// record that cannot be written whole is not left in part: the attachment has none then.
func (d Dir) Put(ctx context.Context, r *Record) error {
	if err := r.validate(); err != nil {
		return fmt.Errorf("attachment record: %w", err)
	}
	data, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("attachment record: %w", err)
	}
	if len(data) > maxRecord {
		return fmt.Errorf("attachment record of %s: %d bytes are more than %d", r.ID(), len(data), maxRecord)
	}
	for _, dir := range []string{d.records(), d.byIP()} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("attachment record of %s: %w", r.ID(), err)
		}
	}
	return d.locked(ctx, func() error {
		if err := d.write(r, data); err != nil {
			return errors.Join(fmt.Errorf("attachment record of %s: %w", r.ID(), err), d.remove(r.ContainerID, r.IfName))
		}
		return nil
	})
}

func (d Dir) write(r *Record, data []byte) error {
	if err := d.releaseIPs(r.ContainerID, r.IfName); err != nil {
		return err
	}
	file := d.recordFile(r.ContainerID, r.IfName)
	if err := replace(file, func(tmp string) error { return os.WriteFile(tmp, data, 0o644) }); err != nil {
		return err
	}
	for _, ip := range r.IPs {
		if err := replace(d.ipFile(ip), func(tmp string) error { return os.Link(file, tmp) }); err != nil {
			return fmt.Errorf("address %s: %w", ip, err)
		}
	}
	return nil
}

// replace makes a file by way of a temporary neighbour, whose name no reader looks up, and renames it into place.
func replace(file string, write func(tmp string) error) error {
	tmp := temporary(file)
	// The lock makes this name ours: what stands here is what a killed process left.
	if err := removeIfThere(tmp); err != nil {
		return err
	}
	err := write(tmp)
	if err == nil {
		err = os.Rename(tmp, file)
	}
	if err != nil {
		os.Remove(tmp)
	}
	return err
}

func temporary(file string) string {
	dir, name := filepath.Split(file)
	return filepath.Join(dir, "."+name+".tmp")
}

func removeIfThere(file string) error {
	if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func there(file string) bool {
	_, err := os.Lstat(file)
	return !errors.Is(err, fs.ErrNotExist)
}

// Get is the record of an attachment; an error that is fs.ErrNotExist where there is none.
func (d Dir) Get(containerID, ifName string) (*Record, error) {
	if err := Valid(containerID, ifName); err != nil {
		return nil, err
	}
	file := d.recordFile(containerID, ifName)
	r, err := read(file)
	if err == nil && (r.ContainerID != containerID || r.IfName != ifName) {
		// A DEL of this attachment would remove the rules of the other.
		return nil, fmt.Errorf("attachment record %s is of %s", file, r.ID())
	}
	return r, err
}

// Holder is the record of the attachment that holds ip now; an error that is fs.ErrNotExist where none does.
func (d Dir) Holder(ip netip.Addr) (*Record, error) {
	file := d.ipFile(ip)
	r, err := read(file)
	if err == nil && !slices.Contains(r.IPs, ip) {
		return nil, fmt.Errorf("attachment record %s of %s does not list the address", file, r.ID())
	}
	return r, err
}

// open opens a record's file. It neither follows a symbolic link nor waits for a FIFO's writer.
func open(file string) (*os.File, error) {
	return os.OpenFile(file, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
}

func read(file string) (*Record, error) {
	f, err := open(file)
	if errors.Is(err, unix.ELOOP) { // no error of reading: List would take all records for unknown
		return nil, fmt.Errorf("attachment record %s: a symbolic link", file)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	r, err := readFrom(f)
	if err != nil {
		return nil, fmt.Errorf("attachment record %s: %w", file, err)
	}
	return r, nil
}

func readFrom(f io.Reader) (*Record, error) {
	data, err := io.ReadAll(io.LimitReader(f, maxRecord+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxRecord {
		return nil, fmt.Errorf("more than %d bytes", maxRecord)
	}
	return Decode(data)
}

// Delete removes the record of an attachment and gives up its IPs, but never an address that another attachment holds by
// now. Nothing to remove is no error, and neither is a record that cannot be read.
func (d Dir) Delete(ctx context.Context, containerID, ifName string) error {
	if err := Valid(containerID, ifName); err != nil {
		return err
	}
	if file := d.recordFile(containerID, ifName); !there(file) && !there(temporary(file)) {
		return nil
	}
	return d.locked(ctx, func() error { return d.remove(containerID, ifName) })
}

func (d Dir) remove(containerID, ifName string) error {
	if err := d.releaseIPs(containerID, ifName); err != nil {
		return err
	}
	file := d.recordFile(containerID, ifName)
	for _, left := range []string{temporary(file), file} {
		if err := removeIfThere(left); err != nil {
			return fmt.Errorf("attachment record of %s: %w", ID(containerID, ifName), err)
		}
	}
	return nil
}

// releaseIPs unlinks every address that is held by the attachment's present record, and what a killed process left on its way
// to that: the links are one file with it.
func (d Dir) releaseIPs(containerID, ifName string) error {
	file := d.recordFile(containerID, ifName)
	own, err := os.Lstat(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	release := func(name string) error {
		link := filepath.Join(d.byIP(), name)
		if held, err := os.Lstat(link); err != nil || !os.SameFile(own, held) {
			return nil
		}
		if err := os.Remove(link); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("attachment record of %s: %w", ID(containerID, ifName), err)
		}
		return nil
	}
	if r, err := read(file); err == nil {
		for _, ip := range r.IPs {
			for _, name := range []string{ip.String(), filepath.Base(temporary(d.ipFile(ip)))} {
				if err := release(name); err != nil {
					return err
				}
			}
		}
		return nil
	}
	// An unreadable record still names its links by being one file with them.
	entries, err := os.ReadDir(d.byIP())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, e := range entries {
		if err := release(e.Name()); err != nil {
			return err
		}
	}
	return nil
}

// List is every record, in the order of their file names. What is no valid record is in the error, joined; the others come
// with it all the same. Where the directory or a file could not be read the list is nil: which there are is not known then.
func (d Dir) List() ([]*Record, error) {
	entries, err := os.ReadDir(d.records())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	records := []*Record{} // not nil: they are known, all of them
	var errs []error
	for _, e := range entries {
		if filepath.Ext(e.Name()) != ".json" {
			continue
		}
		r, err := read(filepath.Join(d.records(), e.Name()))
		switch {
		case errors.Is(err, fs.ErrNotExist): // removed since
		case isIO(err):
			return nil, err
		case err != nil:
			errs = append(errs, err)
		case e.Name() != r.ID()+".json": // no change of the attachment would find it
			errs = append(errs, fmt.Errorf("record %s is of %s", e.Name(), r.ID()))
		default:
			records = append(records, r)
		}
	}
	return records, errors.Join(errs...)
}

// isIO tells a file that could not be read from one that holds no record.
func isIO(err error) bool {
	var path *fs.PathError
	return errors.As(err, &path)
}

// ErrLocked is the error of a change that could not have the lock in time: another process holds it for longer than any
// change takes. Trying again later may help.
var ErrLocked = errors.New("the state directory is locked")

// lockWait bounds the wait for the lock, which is held for microseconds unless its holder is stopped.
const lockWait = 5 * time.Second

func (d Dir) locked(ctx context.Context, change func() error) error {
	unlock, err := Lock(ctx, filepath.Join(d.root, "lock"))
	if err != nil {
		return err
	}
	defer unlock()
	return change()
}

// Lock takes the lock that is a file of the state directory, waiting up to five seconds for another process to release it
// or to die; then the error is ErrLocked.
func Lock(ctx context.Context, file string) (unlock func(), err error) {
	return lock(ctx, file, unix.LOCK_EX)
}

// LockShared is Lock for one of several that may hold it together, while nobody holds it alone.
func LockShared(ctx context.Context, file string) (unlock func(), err error) {
	return lock(ctx, file, unix.LOCK_SH)
}

// lock takes the lock of the file that is at the path when it has it: one that was removed while it waited is nobody's lock any more. The
// error wraps fs.ErrNotExist where the directory is gone.
func lock(ctx context.Context, file string, how int) (unlock func(), err error) {
	ctx, cancel := context.WithTimeout(ctx, lockWait)
	defer cancel()
	for {
		f, err := os.OpenFile(file, os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o600)
		if err != nil {
			return nil, err
		}
		if err := flock(ctx, f, how); err != nil {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", file, err)
		}
		locked, err := f.Stat()
		if err == nil {
			var there fs.FileInfo
			if there, err = os.Stat(file); err == nil && os.SameFile(locked, there) {
				return func() { f.Close() }, nil
			}
		}
		f.Close()
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
}

func flock(ctx context.Context, f *os.File, how int) error {
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
		if err == nil || !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return err
		}
		select {
		case <-ctx.Done():
			return ErrLocked
		case <-time.After(wait):
		}
	}
}
