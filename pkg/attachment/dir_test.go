package attachment

import (
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var addresses = cmp.Options{
	cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
	cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b }),
}

func record(containerID string, ips ...string) *Record {
	r := &Record{
		ContainerID: containerID, IfName: "eth0", Network: "net", Netns: "/run/netns/x",
		Pod:      Pod{Namespace: "team", Name: "web-0", UID: "uid-" + containerID},
		HostLink: HostLink{Name: "veth0", Index: 7, Bridge: "br0"},
		Datapath: DatapathBridged, Backend: BackendIPTables,
		Created: time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC),
	}
	for _, ip := range ips {
		one := Redirect{Source: addr(ip), Metadata: netip.MustParseAddrPort("169.254.169.254:80"), Proxy: netip.MustParseAddrPort("192.168.7.2:8181")}
		if one.Source.Is6() {
			one.Metadata, one.Proxy = netip.MustParseAddrPort("[fd00:ec2::254]:80"), netip.MustParseAddrPort("[fd00:7::2]:8181")
		}
		r.IPs, r.Redirects = append(r.IPs, one.Source), append(r.Redirects, one)
	}
	return r
}

func newDir(t *testing.T) Dir { return In(filepath.Join(t.TempDir(), "state")) }

func put(t *testing.T, d Dir, r *Record) {
	t.Helper()
	if err := d.Put(r); err != nil {
		t.Fatal(err)
	}
}

func del(t *testing.T, d Dir, containerID string) {
	t.Helper()
	if err := d.Delete(containerID, "eth0"); err != nil {
		t.Fatal(err)
	}
}

// wantHolders compares the holder of each address, "" for none, and the entries of the addresses'
// directory.
func wantHolders(t *testing.T, d Dir, want map[string]string) {
	t.Helper()
	index := NewIndex(d)
	for ip, id := range want {
		got, err := d.Holder(netip.MustParseAddr(ip))
		if id == "" {
			if !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s: got %v, %v; want no holder", ip, got, err)
			}
		} else if err != nil || got.ContainerID != id {
			t.Errorf("%s: got %v, %v; want %s", ip, got, err, id)
		}
		byIndex, err := index.Holder(netip.MustParseAddr(ip))
		if err != nil || (byIndex == nil) != (id == "") || byIndex != nil && byIndex.ContainerID != id {
			t.Errorf("%s by index: got %v, %v; want %q", ip, byIndex, err, id)
		}
	}
	for _, name := range names(t, d.byIP()) {
		if want[name] == "" {
			t.Errorf("%s is listed", name)
		}
	}
}

func names(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func TestPutGetDelete(t *testing.T) {
	d := newDir(t)
	if _, err := d.Get("a", "eth0"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("before Put: got %v", err)
	}
	want := record("a", "10.1.0.5", "fd00:1::5")
	put(t, d, want)
	for name, get := range map[string]func() (*Record, error){
		"Get":         func() (*Record, error) { return d.Get("a", "eth0") },
		"Holder":      func() (*Record, error) { return d.Holder(want.IPs[0]) },
		"IPv6 Holder": func() (*Record, error) { return d.Holder(want.IPs[1]) },
		"Index":       func() (*Record, error) { return NewIndex(d).Holder(want.IPs[0]) },
	} {
		got, err := get()
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got, addresses); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
	if _, err := d.Get("a", "eth1"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("another interface: got %v", err)
	}
	for range 2 {
		del(t, d, "a")
		wantHolders(t, d, map[string]string{"10.1.0.5": "", "fd00:1::5": ""})
		if _, err := d.Get("a", "eth0"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("after Delete: got %v", err)
		}
	}
}

// TestDeleteWithoutStateDirectory does not create the directory.
func TestDeleteWithoutStateDirectory(t *testing.T) {
	d := newDir(t)
	del(t, d, "a")
	if _, err := os.Stat(d.root); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v", err)
	}
	records, err := d.List()
	if records != nil || err != nil {
		t.Errorf("List: %v, %v", records, err)
	}
}

func TestPutReplacesEarlierRecord(t *testing.T) {
	d := newDir(t)
	put(t, d, record("a", "10.1.0.5", "10.1.0.6"))
	put(t, d, record("a", "10.1.0.6", "10.1.0.7"))
	wantHolders(t, d, map[string]string{"10.1.0.5": "", "10.1.0.6": "a", "10.1.0.7": "a"})
	if diff := cmp.Diff([]string{"a@eth0.json"}, names(t, d.records())); diff != "" {
		t.Error(diff)
	}
}

// TestDeleteAfterAnotherPut deletes the former holder of an address: the new holder keeps it.
func TestDeleteAfterAnotherPut(t *testing.T) {
	d := newDir(t)
	put(t, d, record("a", "10.1.0.5", "10.1.0.6"))
	put(t, d, record("b", "10.1.0.5"))
	wantHolders(t, d, map[string]string{"10.1.0.5": "b", "10.1.0.6": "a"})
	if r, err := d.Get("a", "eth0"); err != nil || len(r.IPs) != 2 {
		t.Errorf("record of the former holder: %v, %v", r, err)
	}
	del(t, d, "a")
	wantHolders(t, d, map[string]string{"10.1.0.5": "b", "10.1.0.6": ""})
	// A second Put of the former holder takes the address back.
	put(t, d, record("a", "10.1.0.5"))
	del(t, d, "b")
	wantHolders(t, d, map[string]string{"10.1.0.5": "a"})
}

// TestKilledProcess starts from each state that a process killed in Put or Delete leaves. No such
// state is a record, and Put, the Put of another attachment, Delete and Repair leave nothing of it.
func TestKilledProcess(t *testing.T) {
	const ip4, ip6 = "10.1.0.5", "fd00:1::5"
	// renamed leaves the temporary file of "a" and the given links.
	renamed := func(linked ...string) func(*testing.T, Dir) {
		return func(t *testing.T, d Dir) {
			put(t, d, record("a", ip4, ip6))
			file := d.recordFile("a", "eth0")
			step(t, os.Rename(file, temporary(file)))
			for _, ip := range []string{ip4, ip6} {
				if !slices.Contains(linked, ip) {
					step(t, os.Remove(d.ipFile(addr(ip))))
				}
			}
		}
	}
	for name, leave := range map[string]func(*testing.T, Dir){
		"half of the temporary file": func(t *testing.T, d Dir) {
			step(t, os.MkdirAll(d.records(), 0o755), os.MkdirAll(d.byIP(), 0o755),
				os.WriteFile(temporary(d.recordFile("a", "eth0")), []byte(`{"contai`), 0o644))
		},
		"the temporary file":                    renamed(),
		"the temporary file and one address":    renamed(ip6),
		"the temporary file and both addresses": renamed(ip4, ip6),
		"an empty temporary file and both addresses": func(t *testing.T, d Dir) {
			renamed(ip4, ip6)(t, d)
			step(t, os.Truncate(temporary(d.recordFile("a", "eth0")), 0))
		},
	} {
		t.Run(name, func(t *testing.T) {
			for then, tc := range map[string]struct {
				do     func(*testing.T, Dir)
				holder string
			}{
				"nothing":                {do: func(*testing.T, Dir) {}},
				"Put":                    {func(t *testing.T, d Dir) { put(t, d, record("a", ip4, ip6)) }, "a"},
				"Put of one address":     {do: func(t *testing.T, d Dir) { put(t, d, record("a", "10.1.0.6")); del(t, d, "a") }},
				"Put of another":         {func(t *testing.T, d Dir) { put(t, d, record("b", ip4, ip6)) }, "b"},
				"Put of another, Delete": {func(t *testing.T, d Dir) { put(t, d, record("b", ip4, ip6)); del(t, d, "a") }, "b"},
				"Delete":                 {do: func(t *testing.T, d Dir) { del(t, d, "a") }},
				"Repair":                 {do: func(t *testing.T, d Dir) { repairs(t, d) }},
				"Put of another, Repair": {func(t *testing.T, d Dir) { put(t, d, record("b", ip4, ip6)); repairs(t, d) }, "b"},
			} {
				t.Run(then, func(t *testing.T) {
					d := newDir(t)
					leave(t, d)
					tc.do(t, d)
					if then == "nothing" {
						if strings.HasPrefix(name, "an empty") {
							return // the address has an unreadable entry, so its holder is unknown
						}
						for _, ip := range []string{ip4, ip6} {
							if r, err := d.Holder(addr(ip)); !errors.Is(err, fs.ErrNotExist) {
								t.Errorf("%s: got %v, %v; want no holder", ip, r, err)
							}
							if r, err := NewIndex(d).Holder(addr(ip)); r != nil || err != nil {
								t.Errorf("%s by index: got %v, %v; want no holder", ip, r, err)
							}
						}
					} else {
						wantHolders(t, d, map[string]string{ip4: tc.holder, ip6: tc.holder})
					}
					records, err := d.List()
					if got := len(records); err != nil || (got == 1) != (tc.holder != "") || got == 1 && records[0].ContainerID != tc.holder {
						t.Errorf("List: %v, %v; want %q", records, err, tc.holder)
					}
				})
			}
		})
	}
}

// TestUnreadableRecords damages a record: lookups of its address fail, and Delete removes it.
func TestUnreadableRecords(t *testing.T) {
	for name, content := range map[string]string{
		"empty":            "",
		"no JSON":          "{",
		"another type":     `[]`,
		"no addresses":     `{"containerID":"a","ifName":"eth0","ips":[]}`,
		"a mapped address": `{"containerID":"a","ifName":"eth0","ips":["::ffff:10.1.0.5"]}`,
		"a zone":           `{"containerID":"a","ifName":"eth0","ips":["fe80::1%eth0"]}`,
		"a path as ID":     `{"containerID":"../a","ifName":"eth0","ips":["10.1.0.5"]}`,
		"too long":         `{"containerID":"a","ifName":"eth0","ips":["10.1.0.5"],"netns":"` + strings.Repeat("x", maxRecord) + `"}`,
	} {
		t.Run(name, func(t *testing.T) {
			d := newDir(t)
			put(t, d, record("a", "10.1.0.5"))
			put(t, d, record("b", "10.1.0.6"))
			if err := os.WriteFile(d.recordFile("a", "eth0"), []byte(content), 0o644); err != nil {
				t.Fatal(err)
			}
			ip := netip.MustParseAddr("10.1.0.5")
			unreadable := func(r *Record, err error) {
				t.Helper()
				if r != nil || err == nil || errors.Is(err, fs.ErrNotExist) {
					t.Errorf("got %v, %v; want an error that is not fs.ErrNotExist", r, err)
				}
			}
			unreadable(d.Get("a", "eth0"))
			unreadable(d.Holder(ip))
			unreadable(NewIndex(d).Holder(ip))
			records, err := d.List()
			if err == nil || !strings.Contains(err.Error(), "a@eth0") || len(records) != 1 || records[0].ContainerID != "b" {
				t.Errorf("List: %v, %v; want b, and an error that names a", records, err)
			}
			del(t, d, "a")
			wantHolders(t, d, map[string]string{"10.1.0.5": "", "10.1.0.6": "b"})
		})
	}
}

func TestPutRefusesInvalidRecords(t *testing.T) {
	ip := netip.MustParseAddr("10.1.0.5")
	for name, change := range map[string]func(*Record){
		"no container ID":     func(r *Record) { r.ContainerID = "" },
		"a path":              func(r *Record) { r.ContainerID = "../a" },
		"an ID with an @":     func(r *Record) { r.ContainerID = "a@b" },
		"a long ID":           func(r *Record) { r.ContainerID = strings.Repeat("a", 201) },
		"no interface":        func(r *Record) { r.IfName = "" },
		"a path as interface": func(r *Record) { r.IfName = "a/b" },
		"no IP":               func(r *Record) { r.IPs = nil },
		"the zero IP":         func(r *Record) { r.IPs = []netip.Addr{ip, {}} },
		"a long netns":        func(r *Record) { r.Netns = strings.Repeat("x", maxRecord) },
	} {
		t.Run(name, func(t *testing.T) {
			d := newDir(t)
			r := record("a", "10.1.0.5")
			change(r)
			if err := d.Put(r); err == nil {
				t.Error("no error")
			}
			if got := append(names(t, d.records()), names(t, d.byIP())...); len(got) > 0 {
				t.Errorf("left %v", got)
			}
		})
	}
}

// TestFailedPutLeavesNothing fails because the entry of an address cannot be replaced.
func TestFailedPutLeavesNothing(t *testing.T) {
	d := newDir(t)
	put(t, d, record("b", "10.1.0.7"))
	step(t, os.MkdirAll(filepath.Join(d.ipFile(addr("10.1.0.6")), "file"), 0o755))
	if err := d.Put(record("a", "10.1.0.5", "10.1.0.6")); err == nil {
		t.Error("no error")
	}
	if diff := cmp.Diff([]string{"b@eth0.json"}, names(t, d.records())); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{"10.1.0.6", "10.1.0.7"}, names(t, d.byIP())); diff != "" {
		t.Error(diff)
	}
}
