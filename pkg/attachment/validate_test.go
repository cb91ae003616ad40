package attachment

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// routed and inPod change the bridged record of the tests to another datapath.
func routed(r *Record) { r.Datapath, r.HostLink.Bridge = DatapathRouted, "" }

func inPod(r *Record) {
	r.Datapath, r.HostLink, r.Backend = DatapathPod, HostLink{}, "nftables"
}

func port(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

// TestValidRecords has records as ADD writes them.
func TestValidRecords(t *testing.T) {
	for name, change := range map[string]func(*Record){
		"bridged":                       func(*Record) {},
		"bridged, by nftables":          func(r *Record) { r.Backend = "nftables" },
		"routed":                        routed,
		"routed, by iptables":           func(r *Record) { routed(r); r.Backend = BackendIPTables },
		"routed, a Calico name":         func(r *Record) { routed(r); r.HostLink.Name = "cali0123456789a" },
		"inside the pod":                inPod,
		"inside the pod, with its veth": func(r *Record) { r.Datapath, r.Backend = DatapathPod, "nftables" },
		"no pod":                        func(r *Record) { r.Pod = Pod{} },
		"a pod without a UID":           func(r *Record) { r.Pod.UID = "" },
		"a static pod": func(r *Record) {
			r.Pod = Pod{"kube-system", "etcd-ip-10-0-0-1.ec2.internal", "0123456789abcdef0123456789abcdef"}
		},
		"the longest pod": func(r *Record) {
			r.Pod = Pod{strings.Repeat("a", 63), strings.Repeat("a", 253), strings.Repeat("A", 128)}
		},
		"an address that is not redirected": func(r *Record) { r.Redirects = r.Redirects[:1] },
		"no redirection":                    func(r *Record) { r.Redirects = nil },
		"a link-local IPv4 address":         func(r *Record) { r.IPs = append(r.IPs, addr("169.254.172.5")) },
		"another metadata address":          func(r *Record) { r.Redirects[0].Metadata = port("100.100.100.200:80") },
		"a namespace by a process":          func(r *Record) { r.Netns = "/proc/123/ns/net" },
		"the clock at its start":            func(r *Record) { r.Created = time.Unix(1, 0).UTC() },
	} {
		r := record("a", "10.1.0.5", "fd00:1::5")
		change(r)
		data, err := json.Marshal(r)
		if err == nil {
			_, err = Decode(data)
		}
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestInvalidRecords has one invalid field each: Put does not write them, and Decode refuses them.
func TestInvalidRecords(t *testing.T) {
	for name, change := range map[string]func(*Record){
		"no container ID":         func(r *Record) { r.ContainerID = "" },
		"an interface with quote": func(r *Record) { r.IfName = `a"b` },
		"a newline in interface":  func(r *Record) { r.IfName = "a\n" },
		"a control character":     func(r *Record) { r.IfName = "a\x01" },
		"a non-breaking space":    func(r *Record) { r.IfName = "a\u00a0" },

		"no network":                 func(r *Record) { r.Network = "" },
		"a newline in the network":   func(r *Record) { r.Network = "net\n" },
		"a network that is a path":   func(r *Record) { r.Network = "../net" },
		"a network that is too long": func(r *Record) { r.Network = strings.Repeat("n", 201) },

		"no netns":               func(r *Record) { r.Netns = "" },
		"a relative netns":       func(r *Record) { r.Netns = "run/netns/x" },
		"the root":               func(r *Record) { r.Netns = "/" },
		"a netns that goes up":   func(r *Record) { r.Netns = "/run/netns/../x" },
		"a netns with a NUL":     func(r *Record) { r.Netns = "/run/netns/x\x00" },
		"a netns with a newline": func(r *Record) { r.Netns = "/run/netns/x\ny" },
		"a netns that is not UTF-8": func(r *Record) {
			r.Netns = "/run/netns/\xff"
		},
		"a netns that is too long": func(r *Record) { r.Netns = "/" + strings.Repeat("x", maxNetns) },

		"a pod without a name":          func(r *Record) { r.Pod.Name = "" },
		"a pod without a namespace":     func(r *Record) { r.Pod.Namespace = "" },
		"a UID alone":                   func(r *Record) { r.Pod = Pod{UID: "uid"} },
		"a namespace with a dot":        func(r *Record) { r.Pod.Namespace = "a.b" },
		"a namespace with a slash":      func(r *Record) { r.Pod.Namespace = "a/b" },
		"a namespace in upper case":     func(r *Record) { r.Pod.Namespace = "A" },
		"a namespace with a hyphen":     func(r *Record) { r.Pod.Namespace = "a-" },
		"a namespace that is long":      func(r *Record) { r.Pod.Namespace = strings.Repeat("a", 64) },
		"a name with an empty label":    func(r *Record) { r.Pod.Name = "a..b" },
		"a name that begins with a dot": func(r *Record) { r.Pod.Name = ".a" },
		"a name with a newline":         func(r *Record) { r.Pod.Name = "a\nb" },
		"a name that is long":           func(r *Record) { r.Pod.Name = strings.Repeat("a", 254) },
		"a UID with a space":            func(r *Record) { r.Pod.UID = "a b" },
		"a UID that is long":            func(r *Record) { r.Pod.UID = strings.Repeat("a", 129) },

		"no IP":                func(r *Record) { r.IPs = nil },
		"the zero IP":          func(r *Record) { r.IPs = append(r.IPs, netip.Addr{}) },
		"a mapped IP":          func(r *Record) { r.IPs = append(r.IPs, addr("::ffff:10.1.0.6")) },
		"an IP with a zone":    func(r *Record) { r.IPs = append(r.IPs, addr("fe80::1%eth0")) },
		"a link-local IPv6":    func(r *Record) { r.IPs = append(r.IPs, addr("fe80::1")) },
		"a loopback IP":        func(r *Record) { r.IPs = append(r.IPs, addr("127.0.0.2")) },
		"the unspecified IP":   func(r *Record) { r.IPs = append(r.IPs, addr("::")) },
		"a multicast IP":       func(r *Record) { r.IPs = append(r.IPs, addr("224.0.0.1")) },
		"the broadcast IP":     func(r *Record) { r.IPs = append(r.IPs, addr("255.255.255.255")) },
		"the metadata service": func(r *Record) { r.IPs = append(r.IPs, addr("169.254.169.254")) },
		"its IPv6 address":     func(r *Record) { r.IPs = append(r.IPs, addr("fd00:ec2::254")) },
		"an IP twice":          func(r *Record) { r.IPs = append(r.IPs, r.IPs[0]) },
		"too many IPs":         func(r *Record) { r.IPs = many(maxIPs + 1) },

		"a newline in the host link": func(r *Record) { r.HostLink.Name = "a\n-A X" },
		"a space in the host link":   func(r *Record) { r.HostLink.Name = "a -j X" },
		"a quote in the host link":   func(r *Record) { r.HostLink.Name = `a"b` },
		"a long host link":           func(r *Record) { r.HostLink.Name = strings.Repeat("a", 16) },
		"a pattern of host links":    func(r *Record) { r.HostLink.Name = "cali+" },
		"an option":                  func(r *Record) { r.HostLink.Name = "-j" },
		"a negation":                 func(r *Record) { r.HostLink.Name = "!" },
		"a path as host link":        func(r *Record) { r.HostLink.Name = "../a" },
		"a host link without index":  func(r *Record) { r.HostLink.Index = 0 },
		"an index without host link": func(r *Record) { inPod(r); r.HostLink.Index = 7 },
		"a negative index":           func(r *Record) { r.HostLink.Index = -1 },
		"an index that is too large": func(r *Record) { r.HostLink.Index = 1 << 31 },
		"a pattern of bridges":       func(r *Record) { r.HostLink.Bridge = "br+" },
		"a newline in the bridge":    func(r *Record) { r.HostLink.Bridge = "br0\n" },
		"a port of itself":           func(r *Record) { r.HostLink.Bridge = r.HostLink.Name },
		"a bridge without a port":    func(r *Record) { inPod(r); r.HostLink.Bridge = "br0" },

		"no datapath":              func(r *Record) { r.Datapath = "" },
		"another datapath":         func(r *Record) { r.Datapath = "direct" },
		"routed by a bridge":       func(r *Record) { r.Datapath = DatapathRouted },
		"routed by nothing":        func(r *Record) { r.Datapath, r.HostLink = DatapathRouted, HostLink{} },
		"bridged without a bridge": func(r *Record) { r.HostLink.Bridge = "" },
		"inside the pod, iptables": func(r *Record) { inPod(r); r.Backend = BackendIPTables },
		"no backend":               func(r *Record) { r.Backend = "" },
		"another backend":          func(r *Record) { r.Backend = "ipset" },
		"no time":                  func(r *Record) { r.Created = time.Time{} },
		"a time too far ahead":     func(r *Record) { r.Created = r.Created.AddDate(1000, 0, 0) },

		"another's address":             func(r *Record) { r.Redirects[0].Source = addr("10.1.0.6") },
		"an address twice":              func(r *Record) { r.Redirects[1] = r.Redirects[0] },
		"no source":                     func(r *Record) { r.Redirects[0].Source = netip.Addr{} },
		"no service":                    func(r *Record) { r.Redirects[0].Metadata = netip.AddrPort{} },
		"a service of the other family": func(r *Record) { r.Redirects[0].Metadata = r.Redirects[1].Metadata },
		"another port":                  func(r *Record) { r.Redirects[0].Metadata = port("169.254.169.254:443") },
		"another IPv6 service":          func(r *Record) { r.Redirects[1].Metadata = port("[fd00::1]:80") },
		"a loopback service":            func(r *Record) { r.Redirects[0].Metadata = port("127.0.0.1:80") },
		"two services of a family": func(r *Record) {
			r.IPs = append(r.IPs, addr("10.1.0.6"))
			r.Redirects = append(r.Redirects, Redirect{addr("10.1.0.6"), port("100.100.100.200:80"), r.Redirects[0].Proxy})
		},
		"itself as service":           func(r *Record) { r.Redirects[0].Metadata = port("10.1.0.5:80") },
		"no proxy":                    func(r *Record) { r.Redirects[0].Proxy = netip.AddrPort{} },
		"a proxy of the other family": func(r *Record) { r.Redirects[0].Proxy = r.Redirects[1].Proxy },
		"a proxy without a port":      func(r *Record) { r.Redirects[0].Proxy = port("192.168.7.2:0") },
		"a loopback proxy":            func(r *Record) { r.Redirects[0].Proxy = port("127.0.0.1:8181") },
		"the service as proxy":        func(r *Record) { r.Redirects[0].Proxy = port("169.254.169.254:8181") },
	} {
		t.Run(name, func(t *testing.T) {
			r := record("a", "10.1.0.5", "fd00:1::5")
			change(r)
			d := newDir(t)
			if err := d.Put(r); err == nil {
				t.Error("Put succeeded")
			}
			if got := append(names(t, d.records()), names(t, d.byIP())...); len(got) > 0 {
				t.Errorf("left %v", got)
			}
			data, err := json.Marshal(r)
			if err != nil {
				return // it has no JSON form
			}
			if got, err := Decode(data); err == nil || len(err.Error()) > 500 || strings.ContainsAny(err.Error(), "\n\x00") {
				t.Errorf("decoded as %+v, %v; want an error of one short line", got, err)
			}
		})
	}
}

func many(n int) (ips []netip.Addr) {
	for i := range n {
		ips = append(ips, netip.AddrFrom4([4]byte{10, 2, 0, byte(i)}))
	}
	return ips
}

// TestUnknownFields decodes the record of a newer program, and no data after a record.
func TestUnknownFields(t *testing.T) {
	data, err := json.Marshal(record("a", "10.1.0.5"))
	step(t, err)
	newer := strings.Replace(string(data), "{", `{"listener":"pod","hostLinkKind":{"a":1},`, 1)
	if _, err := Decode([]byte(newer)); err != nil {
		t.Error(err)
	}
	if r, err := Decode(append(data, data...)); err == nil {
		t.Errorf("two records are decoded as %v", r)
	}
}

// TestForeignFiles has files that only another program makes. List follows no link, waits for no
// writer, reports the file, and returns the other records.
func TestForeignFiles(t *testing.T) {
	for name, make := range map[string]func(Dir, string) error{
		"a symbolic link": func(d Dir, file string) error { return os.Symlink(d.recordFile("b", "eth0"), file) },
		"a FIFO":          func(_ Dir, file string) error { return unix.Mkfifo(file, 0o600) },
		"another attachment's": func(d Dir, file string) error {
			data, err := os.ReadFile(d.recordFile("b", "eth0"))
			if err == nil {
				err = os.WriteFile(file, data, 0o600)
			}
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDir(t)
			put(t, d, record("b", "10.1.0.6"))
			file := d.recordFile("a", "eth0")
			step(t, make(d, file))
			if r, err := d.Get("a", "eth0"); err == nil {
				t.Errorf("Get: %s", r.ID())
			}
			records, err := d.List()
			if err == nil || !strings.Contains(err.Error(), filepath.Base(file)) || len(records) != 1 || records[0].ContainerID != "b" {
				t.Errorf("List: %v, %v; want b, and an error that names a", records, err)
			}
			del(t, d, "a")
			wantHolders(t, d, map[string]string{"10.1.0.6": "b"})
		})
	}
}

// TestEntryOfUnlistedAddress links an address to the record of an attachment that does not have it.
func TestEntryOfUnlistedAddress(t *testing.T) {
	d := newDir(t)
	put(t, d, record("a", "10.1.0.5"))
	step(t, os.Link(d.recordFile("a", "eth0"), d.ipFile(addr("10.1.0.6"))))
	if r, err := d.Holder(addr("10.1.0.6")); err == nil {
		t.Errorf("got %s", r.ID())
	}
	if r, err := NewIndex(d).Holder(addr("10.1.0.6")); err == nil {
		t.Errorf("by index: got %s", r.ID())
	}
}

// TestNewlineInARecord attacks iptables-restore with a newline: the record is refused, and Delete
// removes it.
func TestNewlineInARecord(t *testing.T) {
	d := newDir(t)
	put(t, d, record("a", "10.1.0.5"))
	file := d.recordFile("a", "eth0")
	data, err := os.ReadFile(file)
	step(t, err)
	attack := strings.Replace(string(data), `"veth0"`, `"veth0\n-A KUBE2IAM-CNI -j ACCEPT\n"`, 1)
	if attack == string(data) {
		t.Fatalf("no host link in %s", data)
	}
	step(t, os.WriteFile(file, []byte(attack), 0o644))
	if r, err := d.Get("a", "eth0"); err == nil {
		t.Errorf("Get: %+v", r)
	}
	if r, err := NewIndex(d).Holder(addr("10.1.0.5")); err == nil {
		t.Errorf("Holder: %v", r)
	}
	if records, err := d.List(); err == nil || len(records) > 0 {
		t.Errorf("List: %v, %v", records, fmt.Sprint(err))
	}
	del(t, d, "a")
	wantHolders(t, d, map[string]string{"10.1.0.5": ""})
}
