package attachment

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestIndexSeesEachChange changes the directory in every way. The next lookup of the index sees it.
func TestIndexSeesEachChange(t *testing.T) {
	d := newDir(t)
	x := NewIndex(d)
	ip := netip.MustParseAddr("10.1.0.5")
	wantHolder := func(when, want string) {
		t.Helper()
		for range 2 { // from the directory, then from the cache
			r, err := x.Holder(ip)
			if err != nil || (r == nil) != (want == "") || r != nil && r.ContainerID != want {
				t.Errorf("%s: got %v, %v; want %q", when, r, err, want)
			}
		}
	}
	wantHolder("before there is a directory", "")
	put(t, d, record("b", "10.1.0.6"))
	wantHolder("before there is an entry", "")
	put(t, d, record("a", "10.1.0.5"))
	wantHolder("Put", "a")
	put(t, d, record("b", "10.1.0.5"))
	wantHolder("another's Put", "b")
	del(t, d, "a")
	wantHolder("the former holder's Delete", "b")
	del(t, d, "b")
	wantHolder("Delete", "")
	put(t, d, record("a", "10.1.0.5"))
	if err := os.RemoveAll(d.root); err != nil {
		t.Fatal(err)
	}
	// The plugin never removes the directory, so the holder is unknown.
	for range 2 {
		if r, err := x.Holder(ip); !errors.Is(err, ErrNoRecords) {
			t.Errorf("the directory is removed: got %v, %v; want ErrNoRecords", r, err)
		}
	}
	put(t, d, record("c", "10.1.0.5"))
	wantHolder("the directory is created again", "c")
	// The lost records can hold any address that has no entry.
	if r, err := x.Holder(netip.MustParseAddr("10.1.0.6")); !errors.Is(err, ErrNoRecords) {
		t.Errorf("an address without an entry in the new directory: got %v, %v; want ErrNoRecords", r, err)
	}
	if err := os.Rename(d.root, d.root+".aside"); err != nil {
		t.Fatal(err)
	}
	put(t, d, record("d", "10.1.0.5"))
	wantHolder("another directory replaces it", "d")
}

// TestIndexSeesReplacedRecord replaces a record by one of the same size: only the inode differs.
func TestIndexSeesReplacedRecord(t *testing.T) {
	d := newDir(t)
	x := NewIndex(d)
	for _, uid := range []string{"uid-1", "uid-2", "uid-3"} {
		r := record("a", "10.1.0.5")
		r.Pod.UID = uid
		put(t, d, r)
		if got, err := x.Holder(r.IPs[0]); err != nil || got.Pod.UID != uid {
			t.Errorf("got %v, %v; want %s", got, err, uid)
		}
	}
}

// TestIndexRefusesForeignEntries has entries that are not a record of the address.
func TestIndexRefusesForeignEntries(t *testing.T) {
	other := netip.MustParseAddr("10.1.0.9")
	for name, make := range map[string]func(Dir, string) error{
		"another address's record": func(d Dir, entry string) error { return os.Link(d.recordFile("a", "eth0"), entry) },
		"a symbolic link":          func(d Dir, entry string) error { return os.Symlink(d.recordFile("a", "eth0"), entry) },
		"a directory":              func(d Dir, entry string) error { return os.Mkdir(entry, 0o755) },
	} {
		t.Run(name, func(t *testing.T) {
			d := newDir(t)
			put(t, d, record("a", "10.1.0.5"))
			if err := make(d, filepath.Join(d.byIP(), other.String())); err != nil {
				t.Fatal(err)
			}
			x := NewIndex(d)
			for range 2 {
				if r, err := x.Holder(other); r != nil || err == nil {
					t.Errorf("got %v, %v; want an error", r, err)
				}
			}
		})
	}
}

// TestIndexOfDamagedRecord damages a cached record and then replaces it.
func TestIndexOfDamagedRecord(t *testing.T) {
	d := newDir(t)
	want := record("a", "10.1.0.5")
	put(t, d, want)
	x := NewIndex(d)
	if _, err := x.Holder(want.IPs[0]); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(d.recordFile("a", "eth0"), 3); err != nil {
		t.Fatal(err)
	}
	if r, err := x.Holder(want.IPs[0]); r != nil || err == nil {
		t.Errorf("got %v, %v; want an error", r, err)
	}
	put(t, d, want)
	got, err := x.Holder(want.IPs[0])
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, addresses); diff != "" {
		t.Error(diff)
	}
}

func TestIndexIsBounded(t *testing.T) {
	d := newDir(t)
	put(t, d, record("a", "10.1.0.5"))
	x := NewIndex(d)
	ip := netip.MustParseAddr("10.1.0.5")
	if _, err := x.Holder(ip); err != nil {
		t.Fatal(err)
	}
	for other := netip.MustParseAddr("10.2.0.0"); len(x.read) < maxIndex; other = other.Next() {
		x.read[other] = x.read[ip]
	}
	put(t, d, record("b", "10.1.0.6"))
	if r, err := x.Holder(netip.MustParseAddr("10.1.0.6")); err != nil || r.ContainerID != "b" {
		t.Errorf("got %v, %v", r, err)
	}
	if len(x.read) != 1 {
		t.Errorf("caches %d", len(x.read))
	}
	if r, err := x.Holder(ip); err != nil || r.ContainerID != "a" {
		t.Errorf("got %v, %v", r, err)
	}
}

// TestIndexCachesHoldersOnly looks up addresses without a holder: they take no memory.
func TestIndexCachesHoldersOnly(t *testing.T) {
	d := newDir(t)
	put(t, d, record("a", "10.1.0.5"))
	x := NewIndex(d)
	for i, ip := 0, netip.MustParseAddr("10.9.0.0"); i < 100; i, ip = i+1, ip.Next() {
		if r, err := x.Holder(ip); r != nil || err != nil {
			t.Fatalf("got %v, %v", r, err)
		}
	}
	if len(x.read) != 0 {
		t.Errorf("caches %d", len(x.read))
	}
}
