package attachment

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// Dir is the part of the state directory that has the records:
//
//	attachments/<containerID>@<ifName>.json   the record
//	by-ip/<address>                           a hard link to the record of the address's holder
//
// A record exists only while all its addresses lead to it: Put links them before it gives the
// record its name, and Delete takes the name before it unlinks them. A link without a record is
// what a killed process left; its address is free. So a process that is killed at any step leaves
// no record that the next holder of the address would not find.
//
// Nothing is synced to a disk: the attachments do not survive the kernel either. Who changes a
// record holds its locks (lock.go).
type Dir struct{ root string }

// In returns the records of a state directory. Put creates the directory.
func In(stateDir string) Dir { return Dir{root: stateDir} }

func (d Dir) records() string { return filepath.Join(d.root, "attachments") }
func (d Dir) byIP() string    { return filepath.Join(d.root, "by-ip") }

func (d Dir) recordFile(containerID, ifName string) string {
	return filepath.Join(d.records(), ID(containerID, ifName)+".json")
}

func (d Dir) ipFile(ip netip.Addr) string { return filepath.Join(d.byIP(), ip.String()) }

// Put writes the record and makes it the holder of its IPs, in place of an earlier record of the
// same attachment. An address of another attachment changes its holder; the caller removes the
// former holder's rules and record first. If Put fails, the attachment has no record.
func (d Dir) Put(r *Record) error {
	data, err := json.Marshal(r)
	if err := cmp.Or(r.Validate(), err); err != nil {
		return fmt.Errorf("attachment record: %w", err)
	}
	if err := d.Delete(r.ContainerID, r.IfName); err != nil {
		return err
	}
	file := d.recordFile(r.ContainerID, r.IfName)
	tmp := temporary(file)
	err = d.write(tmp, data, r.IPs)
	if err == nil {
		err = os.Rename(tmp, file)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("attachment record of %s: %w", r.ID(), err), d.discard(tmp))
	}
	return nil
}

func (d Dir) write(file string, data []byte, ips []netip.Addr) error {
	for _, dir := range []string{d.records(), d.byIP()} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if err := os.WriteFile(file, data, 0o644); err != nil {
		return err
	}
	for _, ip := range ips {
		if err := d.link(file, ip); err != nil {
			return err
		}
	}
	return nil
}

func (d Dir) link(file string, ip netip.Addr) error {
	link := d.ipFile(ip)
	if err := removeIfExists(link); err != nil {
		return err
	}
	return os.Link(file, link)
}

// temporary returns the name of a record that is being written or removed. Readers do not look it
// up.
func temporary(file string) string {
	dir, name := filepath.Split(file)
	return filepath.Join(dir, "."+name+".tmp")
}

// Get returns the record of an attachment. The error is fs.ErrNotExist if there is none.
func (d Dir) Get(containerID, ifName string) (*Record, error) {
	if err := ValidateID(containerID, ifName); err != nil {
		return nil, err
	}
	return readRecord(d.recordFile(containerID, ifName))
}

// readRecord returns the record in a file of attachments/. A record under another name is an error:
// DEL would remove the rules of the other attachment, whose changes would not find the record.
func readRecord(file string) (*Record, error) {
	r, _, err := read(file)
	if err == nil && filepath.Base(file) != r.ID()+".json" {
		return nil, fmt.Errorf("attachment record %s is of %s", file, r.ID())
	}
	return r, err
}

// Holder returns the record of the attachment that holds ip. The error is fs.ErrNotExist if none
// does.
func (d Dir) Holder(ip netip.Addr) (*Record, error) {
	r, _, err := d.holder(ip)
	return r, err
}

// holder also returns the state of the file that it read.
func (d Dir) holder(ip netip.Addr) (*Record, fs.FileInfo, error) {
	link := d.ipFile(ip)
	r, info, err := read(link)
	if err != nil {
		return nil, nil, err
	}
	if !slices.Contains(r.IPs, ip) {
		return nil, nil, fmt.Errorf("attachment record %s of %s does not list the address", link, r.ID())
	}
	now, err := os.Lstat(d.recordFile(r.ContainerID, r.IfName))
	if err == nil && !os.SameFile(now, info) {
		err = fmt.Errorf("attachment record %s: %w", link, fs.ErrNotExist)
	}
	if err != nil {
		return nil, nil, err
	}
	return r, info, nil
}

// read returns the record in a file, and the state that the file had before it was read. It follows
// no symbolic link and does not wait for the writer of a FIFO.
func read(file string) (*Record, fs.FileInfo, error) {
	f, err := os.OpenFile(file, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ELOOP) { // not a read error: List would return no record at all
		return nil, nil, fmt.Errorf("attachment record %s: a symbolic link", file)
	}
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, nil, err
	}
	data, err := io.ReadAll(io.LimitReader(f, maxRecord+1))
	if err == nil && len(data) > maxRecord {
		err = fmt.Errorf("more than %d bytes", maxRecord)
	}
	var r *Record
	if err == nil {
		r, err = Decode(data)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("attachment record %s: %w", file, err)
	}
	return r, info, nil
}

// Delete removes the record of an attachment and releases its IPs, but not those that another
// attachment holds. It also removes what a killed process left of the attachment. A missing or
// unreadable record is no error.
func (d Dir) Delete(containerID, ifName string) error {
	if err := ValidateID(containerID, ifName); err != nil {
		return err
	}
	file := d.recordFile(containerID, ifName)
	tmp := temporary(file)
	err := d.discard(tmp)
	if err == nil {
		// The attachment has no record from here on. Another Delete finds the rest by this name.
		err = os.Rename(file, tmp)
	}
	if err == nil {
		err = d.discard(tmp)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("attachment record of %s: %w", ID(containerID, ifName), err)
	}
	return nil
}

// discard removes a temporary file and the links to it.
func (d Dir) discard(tmp string) error {
	for _, ip := range d.addressesOf(tmp) {
		if link := d.ipFile(ip); isSameFile(tmp, link) {
			if err := removeIfExists(link); err != nil {
				return err
			}
		}
	}
	return removeIfExists(tmp)
}

// addressesOf returns the addresses of a record, or those that lead to it if it cannot be read.
func (d Dir) addressesOf(file string) (ips []netip.Addr) {
	r, _, err := read(file)
	if err == nil {
		return r.IPs
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	entries, _ := os.ReadDir(d.byIP())
	for _, e := range entries {
		if ip, err := netip.ParseAddr(e.Name()); err == nil && isSameFile(file, d.ipFile(ip)) {
			ips = append(ips, ip)
		}
	}
	return ips
}

func isSameFile(a, b string) bool {
	infoA, errA := os.Lstat(a)
	infoB, errB := os.Lstat(b)
	return errA == nil && errB == nil && os.SameFile(infoA, infoB)
}

func removeIfExists(file string) error {
	if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
