package attachment

import (
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
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

// wantHolders asserts who holds each address, "" being nobody, and that the directory lists no other one.
func wantHolders(t *testing.T, d Dir, want map[string]string) {
	t.Helper()
	index := NewIndex(d)
	for ip, id := range want {
		got, err := d.Holder(netip.MustParseAddr(ip))
		if id == "" {
			if !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s: got %v, %v; want nobody", ip, got, err)
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

func TestDeleteOfNothingMakesNothing(t *testing.T) {
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

func TestPutReplaces(t *testing.T) {
	d := newDir(t)
	put(t, d, record("a", "10.1.0.5", "10.1.0.6"))
	put(t, d, record("a", "10.1.0.6", "10.1.0.7"))
	wantHolders(t, d, map[string]string{"10.1.0.5": "", "10.1.0.6": "a", "10.1.0.7": "a"})
	if diff := cmp.Diff([]string{"a@eth0.json"}, names(t, d.records())); diff != "" {
		t.Error(diff)
	}
}

// TestAddressChangesHands has a DEL that comes after the address has another holder, and one that never comes.
func TestAddressChangesHands(t *testing.T) {
	d := newDir(t)
	put(t, d, record("a", "10.1.0.5", "10.1.0.6"))
	put(t, d, record("b", "10.1.0.5"))
	wantHolders(t, d, map[string]string{"10.1.0.5": "b", "10.1.0.6": "a"})
	if r, err := d.Get("a", "eth0"); err != nil || len(r.IPs) != 2 {
		t.Errorf("the former holder's record: %v, %v", r, err)
	}
	del(t, d, "a")
	wantHolders(t, d, map[string]string{"10.1.0.5": "b", "10.1.0.6": ""})
	// A second ADD of the former holder takes it back, and then it is b's DEL that comes late.
	put(t, d, record("a", "10.1.0.5"))
	del(t, d, "b")
	wantHolders(t, d, map[string]string{"10.1.0.5": "a"})
}

// TestLeftoversOfTheKilled puts in place what each step of a Put or a Delete leaves when it is the last, and then has the
// same, another Put, or a Delete come.
func TestLeftoversOfTheKilled(t *testing.T) {
	const ip4, ip6 = "10.1.0.5", "fd00:1::5"
	must := func(t *testing.T, errs ...error) {
		t.Helper()
		if err := errors.Join(errs...); err != nil {
			t.Fatal(err)
		}
	}
	for name, leave := range map[string]func(*testing.T, Dir){
		"a half-written record": func(t *testing.T, d Dir) {
			must(t, os.MkdirAll(d.records(), 0o755), os.MkdirAll(d.byIP(), 0o755),
				os.WriteFile(filepath.Join(d.records(), ".a@eth0.json.tmp"), []byte(`{"contai`), 0o644))
		},
		"a record without addresses": func(t *testing.T, d Dir) {
			put(t, d, record("a", ip4, ip6))
			must(t, os.RemoveAll(d.byIP()), os.Mkdir(d.byIP(), 0o755))
		},
		"a record with one of two addresses": func(t *testing.T, d Dir) {
			put(t, d, record("a", ip4, ip6))
			must(t, os.Remove(d.ipFile(netip.MustParseAddr(ip6))))
		},
		"an address that is not yet renamed": func(t *testing.T, d Dir) {
			put(t, d, record("a", ip4, ip6))
			must(t, os.Rename(d.ipFile(netip.MustParseAddr(ip6)), filepath.Join(d.byIP(), "."+ip6+".tmp")))
		},
		"addresses that an older record of the same attachment has": func(t *testing.T, d Dir) {
			put(t, d, record("a", ip4, ip6))
			must(t, os.Remove(d.ipFile(netip.MustParseAddr(ip4))), os.Remove(d.ipFile(netip.MustParseAddr(ip6))))
		},
		"an empty record with addresses": func(t *testing.T, d Dir) {
			put(t, d, record("a", ip4, ip6))
			must(t, os.Truncate(d.recordFile("a", "eth0"), 0))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Run("Put", func(t *testing.T) {
				d := newDir(t)
				leave(t, d)
				put(t, d, record("a", ip4, ip6))
				wantHolders(t, d, map[string]string{ip4: "a", ip6: "a"})
				records, err := d.List()
				if err != nil || len(records) != 1 {
					t.Errorf("List: %v, %v", records, err)
				}
			})
			t.Run("another's Put", func(t *testing.T) {
				d := newDir(t)
				leave(t, d)
				put(t, d, record("b", ip4, ip6))
				wantHolders(t, d, map[string]string{ip4: "b", ip6: "b"})
			})
			t.Run("Delete", func(t *testing.T) {
				d := newDir(t)
				leave(t, d)
				del(t, d, "a")
				for _, ip := range []string{ip4, ip6} {
					if r, err := d.Holder(netip.MustParseAddr(ip)); !errors.Is(err, fs.ErrNotExist) {
						t.Errorf("%s: got %v, %v; want nobody", ip, r, err)
					}
				}
				if records, err := d.List(); err != nil || len(records) > 0 {
					t.Errorf("List: %v, %v", records, err)
				}
			})
		})
	}
}

// TestUnreadable has records that say nothing, or too much, or what no record may say.
func TestUnreadable(t *testing.T) {
	for name, content := range map[string]string{
		"empty":           "",
		"no JSON":         "{",
		"another type":    `[]`,
		"no addresses":    `{"containerID":"a","ifName":"eth0","ips":[]}`,
		"a mapped one":    `{"containerID":"a","ifName":"eth0","ips":["::ffff:10.1.0.5"]}`,
		"a zone":          `{"containerID":"a","ifName":"eth0","ips":["fe80::1%eth0"]}`,
		"a path for a ID": `{"containerID":"../a","ifName":"eth0","ips":["10.1.0.5"]}`,
		"too long":        `{"containerID":"a","ifName":"eth0","ips":["10.1.0.5"],"netns":"` + strings.Repeat("x", maxRecord) + `"}`,
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
					t.Errorf("got %v, %v; want an error that is not that of nobody", r, err)
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

func TestPutRefuses(t *testing.T) {
	ip := netip.MustParseAddr("10.1.0.5")
	for name, change := range map[string]func(*Record){
		"no container ID":      func(r *Record) { r.ContainerID = "" },
		"a path":               func(r *Record) { r.ContainerID = "../a" },
		"an ID with an @":      func(r *Record) { r.ContainerID = "a@b" },
		"a long ID":            func(r *Record) { r.ContainerID = strings.Repeat("a", 201) },
		"no interface":         func(r *Record) { r.IfName = "" },
		"a path for interface": func(r *Record) { r.IfName = "a/b" },
		"no IP":                func(r *Record) { r.IPs = nil },
		"the zero IP":          func(r *Record) { r.IPs = []netip.Addr{ip, {}} },
		"too much":             func(r *Record) { r.Netns = strings.Repeat("x", maxRecord) },
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

// TestPutThatFails has an address that cannot be taken: nothing of the record stays.
func TestPutThatFails(t *testing.T) {
	d := newDir(t)
	put(t, d, record("b", "10.1.0.7"))
	if err := os.Mkdir(d.ipFile(netip.MustParseAddr("10.1.0.6")), 0o755); err != nil {
		t.Fatal(err)
	}
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
