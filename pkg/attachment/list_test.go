package attachment

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

// step ends the test if one of the errors is not nil.
func step(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

func TestRepair(t *testing.T) {
	const ip4, ip6 = "10.1.0.5", "fd00:1::5"
	both := map[string]string{ip4: "a", ip6: "a"}
	for name, tc := range map[string]struct {
		leave   func(*testing.T, Dir)
		did     []string // DIR stands for the state directory
		holders map[string]string
		records []string
	}{
		"nothing": {leave: func(*testing.T, Dir) {}, holders: both},
		"a half-written record": {
			leave: func(t *testing.T, d Dir) {
				step(t, os.WriteFile(filepath.Join(d.records(), ".b@eth0.json.tmp"), []byte(`{"contai`), 0o644))
			},
			did:     []string{"temporary file DIR/attachments/.b@eth0.json.tmp"},
			holders: both,
		},
		"a whole record that was not renamed": {
			leave: func(t *testing.T, d Dir) {
				put(t, d, record("b", "10.1.0.6"))
				step(t, os.Rename(d.recordFile("b", "eth0"), filepath.Join(d.records(), ".b@eth0.json.tmp")))
			},
			did:     []string{"address without a record DIR/by-ip/10.1.0.6", "temporary file DIR/attachments/.b@eth0.json.tmp"},
			holders: both,
		},
		"a record without one of its addresses": {
			leave:   func(t *testing.T, d Dir) { step(t, os.Remove(d.ipFile(addr(ip4)))) },
			did:     []string{"address of a@eth0 DIR/by-ip/10.1.0.5"},
			holders: both,
		},
		"a record without any address": {
			leave:   func(t *testing.T, d Dir) { step(t, os.Remove(d.ipFile(addr(ip4))), os.Remove(d.ipFile(addr(ip6)))) },
			did:     []string{"address of a@eth0 DIR/by-ip/10.1.0.5", "address of a@eth0 DIR/by-ip/fd00:1::5"},
			holders: both,
		},
		"an address whose record is gone": {
			leave: func(t *testing.T, d Dir) {
				put(t, d, record("b", "10.1.0.6"))
				step(t, os.Remove(d.recordFile("b", "eth0")))
			},
			did:     []string{"address without a record DIR/by-ip/10.1.0.6"},
			holders: map[string]string{ip4: "a", ip6: "a", "10.1.0.6": ""},
		},
		"a record that was copied over itself": {
			leave: func(t *testing.T, d Dir) {
				data, err := os.ReadFile(d.recordFile("a", "eth0"))
				step(t, err, os.Remove(d.recordFile("a", "eth0")), os.WriteFile(d.recordFile("a", "eth0"), data, 0o644))
			},
			did: []string{"address of a@eth0 DIR/by-ip/10.1.0.5", "address of a@eth0 DIR/by-ip/fd00:1::5",
				"address without a record DIR/by-ip/10.1.0.5", "address without a record DIR/by-ip/fd00:1::5"},
			holders: both,
		},
		"an address of another holder": {
			leave: func(t *testing.T, d Dir) {
				put(t, d, record("b", ip4))
				step(t, os.Remove(d.ipFile(addr(ip6))))
			},
			did:     []string{"address of a@eth0 DIR/by-ip/fd00:1::5"},
			holders: map[string]string{ip4: "b", ip6: "a"},
			records: []string{"a@eth0.json", "b@eth0.json"},
		},
		"all addresses, and their directory": {
			leave:   func(t *testing.T, d Dir) { step(t, os.RemoveAll(d.byIP())) },
			did:     []string{"address of a@eth0 DIR/by-ip/10.1.0.5", "address of a@eth0 DIR/by-ip/fd00:1::5"},
			holders: both,
		},
		"all records, and their directory": {
			leave:   func(t *testing.T, d Dir) { step(t, os.RemoveAll(d.records())) },
			did:     []string{"address without a record DIR/by-ip/10.1.0.5", "address without a record DIR/by-ip/fd00:1::5"},
			holders: map[string]string{ip4: "", ip6: ""},
			records: []string{},
		},
		"an entry that is no address": {
			leave: func(t *testing.T, d Dir) {
				step(t, os.WriteFile(filepath.Join(d.byIP(), "notes"), nil, 0o644))
			},
			did:     []string{"address without a record DIR/by-ip/notes"},
			holders: both,
		},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDir(t)
			put(t, d, record("a", ip4, ip6))
			tc.leave(t, d)
			did := repairs(t, d)
			for i := range did {
				did[i] = strings.ReplaceAll(did[i], d.root, "DIR")
			}
			slices.Sort(did)
			if diff := cmp.Diff(tc.did, did); diff != "" {
				t.Errorf("repairs:\n%s", diff)
			}
			wantHolders(t, d, tc.holders)
			if tc.records == nil {
				tc.records = []string{"a@eth0.json"}
			}
			if diff := cmp.Diff(tc.records, append([]string{}, names(t, d.records())...)); diff != "" {
				t.Errorf("records:\n%s", diff)
			}
			before := everyFile(t, d.root)
			if did := repairs(t, d); len(did) > 0 {
				t.Errorf("second repair: %q", did)
			}
			if diff := cmp.Diff(before, everyFile(t, d.root)); diff != "" {
				t.Errorf("second repair:\n%s", diff)
			}
		})
	}
}

// everyFile returns the version of each file and directory.
func everyFile(t *testing.T, root string) map[string]string {
	t.Helper()
	files := make(map[string]string)
	step(t, filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		files[path] = fmt.Sprint(st.Ino, st.Ctim, st.Size)
		return nil
	}))
	return files
}

// repairs repairs the directory and returns what was done.
func repairs(t *testing.T, d Dir) []string {
	t.Helper()
	s, err := d.Read()
	step(t, err)
	step(t, s.Repair())
	return s.Repairs
}

// TestRepairOfNothing changes nothing if records and addresses agree.
func TestRepairOfNothing(t *testing.T) {
	d := newDir(t)
	if did := repairs(t, d); did != nil {
		t.Errorf("without a directory: %q", did)
	}
	if _, err := os.Stat(d.root); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the directory was created: %v", err)
	}
	put(t, d, record("a", "10.1.0.5"))
	put(t, d, record("b", "10.1.0.6"))
	before := everyFile(t, d.root)
	if did := repairs(t, d); did != nil {
		t.Errorf("did %q", did)
	}
	if diff := cmp.Diff(before, everyFile(t, d.root)); diff != "" {
		t.Error(diff)
	}
}

// TestRepairKeepsUnreadableRecords keeps also the links, because the addresses are in use.
func TestRepairKeepsUnreadableRecords(t *testing.T) {
	d := newDir(t)
	put(t, d, record("a", "10.1.0.5"))
	put(t, d, record("b", "10.1.0.6"))
	step(t, os.Truncate(d.recordFile("a", "eth0"), 0))
	before := everyFile(t, d.root)
	if did := repairs(t, d); did != nil {
		t.Errorf("did %q", did)
	}
	if diff := cmp.Diff(before, everyFile(t, d.root)); diff != "" {
		t.Error(diff)
	}
}
