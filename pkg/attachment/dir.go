package attachment

import (
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
// Every change is one rename or one unlink, so a reader finds the whole record of an address or
// none. Nothing is synced to a disk: the attachments do not survive the kernel either. Who changes
// a record holds its locks (lock.go).
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
// rules of that one first. If Put fails, the attachment has no record.
func (d Dir) Put(r *Record) error {
	if err := r.Validate(); err != nil {
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
	if err := d.write(r, data); err != nil {
		return errors.Join(fmt.Errorf("attachment record of %s: %w", r.ID(), err), d.Delete(r.ContainerID, r.IfName))
	}
	return nil
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
		if err := d.link(file, ip); err != nil {
			return err
		}
	}
	return nil
}

func (d Dir) link(file string, ip netip.Addr) error {
	if err := replace(d.ipFile(ip), func(tmp string) error { return os.Link(file, tmp) }); err != nil {
		return fmt.Errorf("address %s: %w", ip, err)
	}
	return nil
}

// replace writes a temporary file, whose name no reader looks up, and renames it.
func replace(file string, write func(tmp string) error) error {
	tmp := temporary(file)
	err := os.Remove(tmp)
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		err = write(tmp)
	}
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

// Get returns the record of an attachment. The error is fs.ErrNotExist if there is none.
func (d Dir) Get(containerID, ifName string) (*Record, error) {
	if err := ValidateID(containerID, ifName); err != nil {
		return nil, err
	}
	file := d.recordFile(containerID, ifName)
	r, err := read(file)
	if err == nil && (r.ContainerID != containerID || r.IfName != ifName) {
		// DEL would remove the rules of the other attachment.
		return nil, fmt.Errorf("attachment record %s is of %s", file, r.ID())
	}
	return r, err
}

// Holder returns the record of the attachment that holds ip. The error is fs.ErrNotExist if none
// does.
func (d Dir) Holder(ip netip.Addr) (*Record, error) {
	file := d.ipFile(ip)
	r, err := read(file)
	if err == nil && !slices.Contains(r.IPs, ip) {
		return nil, fmt.Errorf("attachment record %s of %s does not list the address", file, r.ID())
	}
	return r, err
}

// open opens a record's file. It follows no symbolic link and does not wait for the writer of a
// FIFO.
func open(file string) (*os.File, error) {
	return os.OpenFile(file, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
}

func read(file string) (*Record, error) {
	f, err := open(file)
	if errors.Is(err, unix.ELOOP) { // not a read error: List would return no record at all
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

// Delete removes the record of an attachment and releases its IPs, but not those that another
// attachment holds. A missing or unreadable record is no error.
func (d Dir) Delete(containerID, ifName string) error {
	if err := ValidateID(containerID, ifName); err != nil {
		return err
	}
	err := d.releaseIPs(containerID, ifName)
	file := d.recordFile(containerID, ifName)
	for _, path := range []string{temporary(file), file} {
		if err == nil {
			err = removeIfExists(path)
		}
	}
	if err != nil {
		return fmt.Errorf("attachment record of %s: %w", ID(containerID, ifName), err)
	}
	return nil
}

// releaseIPs removes the links to the attachment's record, also temporary ones of a killed process.
func (d Dir) releaseIPs(containerID, ifName string) error {
	file := d.recordFile(containerID, ifName)
	var links []string
	r, err := read(file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		if links, err = d.linksOf(file); err != nil {
			return err
		}
	default:
		for _, ip := range r.IPs {
			links = append(links, d.ipFile(ip), temporary(d.ipFile(ip)))
		}
	}
	for _, link := range links {
		if !isSameFile(file, link) {
			continue
		}
		if err := removeIfExists(link); err != nil {
			return err
		}
	}
	return nil
}

// linksOf returns the entries of the addresses' directory that are links to a record. It finds
// those of an unreadable record, too.
func (d Dir) linksOf(file string) ([]string, error) {
	entries, err := os.ReadDir(d.byIP())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var links []string
	for _, e := range entries {
		if link := filepath.Join(d.byIP(), e.Name()); isSameFile(file, link) {
			links = append(links, link)
		}
	}
	return links, nil
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
