package rules

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"log/slog"
	"net/netip"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
)

// host is a network namespace that stands for a node's, with the Node under test. The test's thread
// is in it, and it ends with the thread.
type host struct {
	testing.TB
	*Node
	log *bytes.Buffer
}

// newHost needs root.
func newHost(t testing.TB) *host {
	t.Helper()
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatalf("new network namespace: %v", err)
	}
	// The machine's xtables lock is not the test's.
	t.Setenv("XTABLES_LOCKFILE", filepath.Join(t.TempDir(), "xtables.lock"))
	h := &host{TB: t, log: new(bytes.Buffer)}
	h.Node = New(testSettings, IPTablesDirs(), slog.New(slog.NewTextHandler(h.log, nil)))
	t.Cleanup(h.Close)
	return h
}

var testSettings = Settings{MetadataIP: netip.MustParseAddr("169.254.169.254"), IPv6: true, Guard: true, Mark: 0x1000}

func (h *host) must(err error) {
	h.Helper()
	if err != nil {
		h.Fatal(err)
	}
}

func (h *host) detachID(id string) error {
	_, err := h.DetachID(h.Context(), id, false)
	return err
}

// run runs a command in the namespace and returns its standard output.
func (h *host) run(command string) string {
	h.Helper()
	cmd := exec.Command("sh", "-c", command)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		h.Fatalf("%s: %v\n%s", command, err, stderr.String())
	}
	return string(out)
}

var (
	setElements = regexp.MustCompile(`(?s)elements = \{ (.*?) \}`)
	separator   = regexp.MustCompile(`,\s+`)
)

// ruleset returns the namespace's nftables as nft(8) lists them, without the tables of
// iptables-nft. Tables, sets, chains and elements are sorted: the kernel lists chains in the order
// of their creation, and elements in that of their hashes.
func (h *host) ruleset() string {
	h.Helper()
	var tables []string
	for line := range strings.Lines(h.run("nft list ruleset")) {
		switch {
		case strings.HasPrefix(line, "#"):
		case strings.HasPrefix(line, "table "):
			tables = append(tables, line)
		default:
			tables[len(tables)-1] += line
		}
	}
	tables = slices.DeleteFunc(tables, func(t string) bool {
		return slices.Contains([]string{"filter", "mangle", "nat"}, strings.Fields(t)[2])
	})
	for i, t := range tables {
		tables[i] = setElements.ReplaceAllStringFunc(t, func(all string) string {
			elements := separator.Split(setElements.FindStringSubmatch(all)[1], -1)
			slices.Sort(elements)
			return "elements = {\n\t\t\t" + strings.Join(elements, "\n\t\t\t") + "\n\t\t}"
		})
	}
	for i, t := range tables {
		header, body, _ := strings.Cut(t, "\n")
		objects := strings.Split(strings.TrimSuffix(strings.TrimRight(body, "\n"), "\n}"), "\n\n")
		slices.SortStableFunc(objects, func(a, b string) int {
			return cmp.Or(strings.Count(a, " hook ")-strings.Count(b, " hook "), strings.Compare(a, b)) // chains last
		})
		tables[i] = header + "\n" + strings.Join(objects, "\n\n") + "\n}\n"
	}
	slices.Sort(tables)
	return strings.Join(tables, "\n")
}

// generation returns the number of nftables transactions of the namespace (NFTA_GEN_ID in
// linux/netfilter/nf_tables.h), those of iptables-nft included.
func (h *host) generation() uint32 {
	h.Helper()
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	h.must(err)
	defer conn.Close()
	replies, err := conn.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETGEN, Flags: netlink.Request},
		Data:   []byte{unix.AF_UNSPEC, 0, 0, 0},
	})
	h.must(err)
	attributes, err := netlink.NewAttributeDecoder(replies[0].Data[4:])
	h.must(err)
	attributes.ByteOrder = binary.BigEndian
	for attributes.Next() {
		if attributes.Type() == unix.NFTA_GEN_ID {
			return attributes.Uint32()
		}
	}
	h.Fatal("the kernel returned no generation")
	return 0
}

// wantTransactions asserts how many nftables transactions a call makes.
func (h *host) wantTransactions(call string, want uint32, do func()) {
	h.Helper()
	before := h.generation()
	do()
	if got := h.generation() - before; got != want {
		h.Errorf("%s made %d transactions, want %d", call, got, want)
	}
}

var (
	metadata4 = netip.MustParseAddrPort("169.254.169.254:80")
	metadata6 = netip.MustParseAddrPort("[fd00:ec2::254]:80")
	proxy4    = netip.MustParseAddrPort("192.168.7.2:8181")
	proxy6    = netip.MustParseAddrPort("[fd00:7::2]:8181")
)

// record returns the record of a pod's eth0 with nftables.
func record(container string, datapath attachment.Datapath, link string, ips ...string) *attachment.Record {
	r := &attachment.Record{
		ContainerID: container, IfName: "eth0", Network: "net", Netns: "/run/netns/" + container,
		Datapath: datapath, Backend: attachment.BackendNFTables, Created: time.Unix(1<<30, 0).UTC(),
		HostLink: attachment.HostLink{Name: link, Index: 7},
	}
	if datapath == attachment.DatapathBridged {
		r.HostLink.Bridge = "cni0"
	}
	for _, s := range ips {
		ip := netip.MustParseAddr(s)
		redirect := attachment.Redirect{Source: ip, Metadata: metadata4, Proxy: proxy4}
		if ip.Is6() {
			redirect.Metadata, redirect.Proxy = metadata6, proxy6
		}
		r.IPs, r.Redirects = append(r.IPs, ip), append(r.Redirects, redirect)
	}
	return r
}

func routed(container, link string, ips ...string) *attachment.Record {
	return record(container, attachment.DatapathRouted, link, ips...)
}

func bridged(container, link string, ips ...string) *attachment.Record {
	return record(container, attachment.DatapathBridged, link, ips...)
}

func withIPTables(r *attachment.Record) *attachment.Record {
	r.Backend = attachment.BackendIPTables
	return r
}

func changeStrings(changes []Change) []string {
	var lines []string
	for _, c := range changes {
		lines = append(lines, c.String())
	}
	return lines
}
