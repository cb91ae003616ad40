// Package filelock locks single bytes of a file against other processes.
//
// The locks are open file description locks (F_OFD_SETLK in fcntl(2)). The kernel releases them
// when the file is closed or its process ends, and any process can test a byte without locking it.
package filelock

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// ErrLocked is the error of a byte that another process has locked.
var ErrLocked = errors.New("another process holds the lock")

// Mode says who else can lock the byte.
type Mode int16

const (
	// Shared allows other shared locks.
	Shared Mode = unix.F_RDLCK
	// Exclusive allows no other lock.
	Exclusive Mode = unix.F_WRLCK
)

// TryLock locks a byte of f, or changes the mode of its lock. The error is ErrLocked if another
// process has the byte locked.
func TryLock(f *os.File, offset int64, mode Mode) error { return set(f, offset, int16(mode)) }

// Unlock releases the lock of a byte of f.
func Unlock(f *os.File, offset int64) error { return set(f, offset, unix.F_UNLCK) }

func set(f *os.File, offset int64, how int16) error {
	for {
		err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: how, Start: offset, Len: 1})
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EACCES):
			return ErrLocked
		case err != nil:
			return fmt.Errorf("lock of %s: %w", f.Name(), err)
		}
		return nil
	}
}

// Lock locks a byte of f and waits for other processes until ctx ends. The error is ErrLocked then.
// It polls: the kernel's waiting call (F_OFD_SETLKW) has no time limit and blocks its thread.
func Lock(ctx context.Context, f *os.File, offset int64, mode Mode) error {
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		err := TryLock(f, offset, mode)
		if !errors.Is(err, ErrLocked) {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %s", ErrLocked, f.Name())
		case <-time.After(wait):
		}
	}
}

// IsLocked reports whether another process has a byte of f locked.
func IsLocked(f *os.File, offset int64) (bool, error) {
	lock := unix.Flock_t{Type: unix.F_WRLCK, Start: offset, Len: 1}
	err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &lock)
	return lock.Type != unix.F_UNLCK, err
}

// Open opens or creates the file at path and calls lock. If the path names another file by then,
// the file was removed between open and lock, and Open starts again: the next process would lock
// another file. The error of lock is returned as it is.
func Open(path string, lock func(*os.File) error) (*os.File, error) {
	for {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
		if err != nil {
			return nil, err
		}
		if err := lock(f); err != nil {
			f.Close()
			return nil, err
		}
		if IsAt(path, f) {
			return f, nil
		}
		f.Close()
	}
}

// IsAt reports whether path names the open file f.
func IsAt(path string, f *os.File) bool {
	named, err := os.Lstat(path)
	if err != nil {
		return false
	}
	open, err := f.Stat()
	return err == nil && os.SameFile(named, open)
}
