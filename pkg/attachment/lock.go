package attachment

import (
	"context"
	"hash/fnv"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/filelock"
)

// The file "lock" of the state directory excludes processes from each other, by byte:
//
//   - Byte 0 is locked shared by each ADD, DEL and GC, and exclusively by the agent and by
//     uninstall while they change anything. Between the record and the rules of one ADD, the agent
//     would take the record for one whose rules were flushed.
//   - Each other byte stands for an attachment or an address, by a hash. ADD and DEL lock those
//     that they concern, from before the record is written or read until record and rules agree.
//     Otherwise a late DEL could remove the rule that the address's next holder has just made, or
//     two ADDs with one address could leave the record of one and the rule of the other. Two names
//     with one hash only wait for each other.
//
// ADDs and DELs of different attachments and addresses run in parallel. A process locks its bytes
// in ascending order, so no two wait for each other. The kernel releases the locks of a killed
// process.
const (
	lockFile   = "lock"
	nodeOffset = 0
)

// lockTimeout bounds the wait for the locks. They are held for milliseconds unless a process is
// stopped.
const lockTimeout = 5 * time.Second

// ErrLocked is the error of a change that did not get its locks in time. A later attempt can
// succeed.
var ErrLocked = filelock.ErrLocked

// LockShared excludes the agent's changes. It creates the state directory.
func (d Dir) LockShared(ctx context.Context) (unlock func(), err error) {
	return d.lockNode(ctx, filelock.Shared)
}

// LockExclusive excludes all other changes of the node. It creates the state directory.
func (d Dir) LockExclusive(ctx context.Context) (unlock func(), err error) {
	return d.lockNode(ctx, filelock.Exclusive)
}

func (d Dir) lockNode(ctx context.Context, mode filelock.Mode) (unlock func(), err error) {
	if err := os.MkdirAll(d.root, 0o755); err != nil {
		return nil, err
	}
	return d.lock(ctx, mode, func() []int64 { return nil })
}

// LockAdd takes the locks of an ADD that writes the record: those of its attachment and addresses,
// of the addresses that the attachment has on record, and of the attachments that hold its
// addresses. It creates the state directory.
func (d Dir) LockAdd(ctx context.Context, r *Record) (unlock func(), err error) {
	if err := os.MkdirAll(d.root, 0o755); err != nil {
		return nil, err
	}
	return d.lock(ctx, filelock.Shared, func() []int64 { return d.offsets(r.ContainerID, r.IfName, r.IPs) })
}

// LockDelete takes the locks of a change that removes the record of an attachment: those of the
// attachment and of its addresses. The error is fs.ErrNotExist if there is no state directory.
func (d Dir) LockDelete(ctx context.Context, containerID, ifName string) (unlock func(), err error) {
	return d.lock(ctx, filelock.Shared, func() []int64 { return d.offsets(containerID, ifName, nil) })
}

// lock locks the node in a mode, and the bytes that offsets returns, in ascending order.
func (d Dir) lock(ctx context.Context, mode filelock.Mode, offsets func() []int64) (unlock func(), err error) {
	ctx, cancel := context.WithTimeout(ctx, lockTimeout)
	defer cancel()
	needed := offsets()
	for {
		f, err := filelock.Open(filepath.Join(d.root, lockFile), func(f *os.File) error {
			return filelock.Lock(ctx, f, nodeOffset, mode)
		})
		if err != nil {
			return nil, err
		}
		for _, offset := range needed {
			if err := filelock.Lock(ctx, f, offset, filelock.Exclusive); err != nil {
				f.Close()
				return nil, err
			}
		}
		// The records may have changed before the locks. A byte is never added to those that are
		// locked: this could break the order.
		locked := needed
		needed = offsets()
		if !slices.ContainsFunc(needed, func(offset int64) bool { return !slices.Contains(locked, offset) }) {
			return func() { f.Close() }, nil
		}
		f.Close()
	}
}

// offsets returns the bytes that a change of the attachment locks, in ascending order.
func (d Dir) offsets(containerID, ifName string, ips []netip.Addr) []int64 {
	file := d.recordFile(containerID, ifName)
	names := []string{ID(containerID, ifName)}
	addresses := slices.Concat(ips, d.addressesOf(file), d.addressesOf(temporary(file)))
	for _, ip := range ips {
		if holder, err := d.Holder(ip); err == nil {
			names = append(names, holder.ID())
			addresses = append(addresses, holder.IPs...)
		}
	}
	for _, ip := range addresses {
		names = append(names, ip.String())
	}
	var offsets []int64
	for _, name := range names {
		hash := fnv.New64a()
		hash.Write([]byte(name))
		offsets = append(offsets, int64(hash.Sum64()>>2)+nodeOffset+1)
	}
	slices.Sort(offsets)
	return slices.Compact(offsets)
}
