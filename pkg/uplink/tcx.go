package uplink

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// tcx attaches by BPF links (Linux 6.6), which are pinned as files named by the interface's index.
// A link ends with its pin and the last process that has it open. Programs of tcx come before all
// tc filters.
type tcx struct{ dir string }

// newTCX returns nil if links cannot be attached or pinned.
func newTCX(dir string) hook {
	if _, err := link.QueryPrograms(link.QueryOptions{Target: 1, Attach: ebpf.AttachTCXEgress}); err != nil {
		return nil
	}
	var stat unix.Statfs_t
	if err := unix.Statfs(filepath.Dir(dir), &stat); err != nil || stat.Type != unix.BPF_FS_MAGIC {
		return nil
	}
	err := os.Mkdir(dir, 0o700)
	if errors.Is(err, fs.ErrExist) {
		err = unix.Access(dir, unix.W_OK) // fails on a read-only file system
	}
	if err != nil {
		return nil
	}
	return tcx{dir}
}

func (t tcx) attach(l netlink.Link, programs []program) (wasMissing bool, err error) {
	index := l.Attrs().Index
	pin := filepath.Join(t.dir, strconv.Itoa(index))
	query, err := link.QueryPrograms(link.QueryOptions{Target: index, Attach: ebpf.AttachTCXEgress})
	if err != nil {
		return false, err
	}
	isGuarded := len(query.Programs) > 0 && isPinned(pin, query.Programs[0])
	if isGuarded && has(programs, query.Programs[0].ID) {
		return false, nil
	}
	// The link is missing, or runs an earlier agent's program, or another program was put ahead of it.
	// The pin can also be of an earlier interface with this index.
	unused := slices.IndexFunc(programs, func(p program) bool {
		return !slices.ContainsFunc(query.Programs, func(attached link.AttachedProgram) bool { return attached.ID == p.id })
	})
	if unused < 0 {
		return false, errors.New("the program is attached twice")
	}
	head, err := link.AttachTCX(link.TCXOptions{
		Interface: index, Program: programs[unused].Program, Attach: ebpf.AttachTCXEgress, Anchor: link.Head(),
	})
	if err != nil {
		return false, err
	}
	defer head.Close()
	err = t.pin(head, pin)
	return !isGuarded && err == nil, err
}

// isPinned reports whether a program is attached by the link that is pinned.
func isPinned(pin string, program link.AttachedProgram) bool {
	pinned, err := link.LoadPinnedLink(pin, nil)
	if err != nil {
		return false
	}
	defer pinned.Close()
	info, err := pinned.Info()
	id, hasID := program.LinkID()
	return err == nil && hasID && info.ID == id
}

// pin pins a link in place of an earlier one, which it detaches. Without its pin the earlier link
// would end, too, but only when the kernel comes to it.
func (t tcx) pin(l link.Link, pin string) error {
	temporary := filepath.Join(t.dir, "new")
	if err := os.Remove(temporary); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := l.Pin(temporary); err != nil {
		return err
	}
	former, missing := link.LoadPinnedLink(pin, nil)
	if err := os.Rename(temporary, pin); err != nil || missing != nil {
		return err
	}
	defer former.Close()
	return detach(former)
}

// detach detaches a link whose interface can be gone.
func detach(l link.Link) error {
	if err := l.Detach(); !errors.Is(err, unix.ENOLINK) {
		return err
	}
	return nil
}

func removeTCX(dir string) error {
	pins, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	errs := []error{err}
	for _, entry := range pins {
		pin := filepath.Join(dir, entry.Name())
		if l, err := link.LoadPinnedLink(pin, nil); err == nil {
			errs = append(errs, detach(l), l.Close())
		}
		errs = append(errs, os.Remove(pin))
	}
	return errors.Join(append(errs, os.Remove(dir))...)
}
