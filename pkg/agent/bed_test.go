package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attach"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/hostlink"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/ipfamily"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/rules"
	"github.com/kube2iam-cni/kube2iam-cni/test/netnstest"
	"github.com/kube2iam-cni/kube2iam-cni/test/ruleset"
)

// bed is an agent whose rules and records are real, in a network namespace and a directory of the test,
// and whose interfaces and pods are fake.
type bed struct {
	*testing.T
	*Agent
	links     map[int]string            // the host's interfaces
	pods      map[string]*hostlink.Link // the eth0 of each pod, by the path of its network namespace
	cuts      []netip.AddrPort
	chained   []string        // the networks that the plugin is chained in
	lookups   int             // of addresses in network namespaces
	destroyed []string        // the calls of DestroySockets, with the records at that time, and of DropQueued
	output    strings.Builder // the log
	commands  string          // a directory of iptables commands that come before the node's
}

const testMark = 0x1000

var services = []netip.AddrPort{netip.MustParseAddrPort("169.254.169.254:80"), netip.MustParseAddrPort("[fd00:ec2::254]:80")}

func TestMain(m *testing.M) { netnstest.Main(m) }

// newBed returns the agent of a node without pods.
func newBed(t *testing.T, backend string) *bed {
	t.Helper()
	netnstest.New(t).Enter()
	b := &bed{T: t, commands: t.TempDir(), links: map[int]string{1: "lo"}, chained: []string{"net"}, pods: make(map[string]*hostlink.Link)}
	settings := attach.Settings{
		ProxyPort: 8181, MetadataIP: services[0].Addr(), StateDir: filepath.Join(t.TempDir(), "state"),
		Backend: backend, Guard: true, Mark: testMark,
	}
	system := System{
		System: attach.System{
			FindLink: func(netnsPath, ifName string) (*hostlink.Link, error) {
				if pod := b.pods[netnsPath]; pod != nil && ifName == "eth0" {
					return pod, nil
				}
				return nil, hostlink.ErrNetns
			},
			NodeIP: func(f ipfamily.Family) (netip.Addr, error) {
				return map[ipfamily.Family]netip.Addr{ipfamily.IPv4: netip.MustParseAddr("192.168.7.2"), ipfamily.IPv6: netip.MustParseAddr("fd00:7::2")}[f], nil
			},
			HasIPv6:      func() bool { return true },
			IPTablesDirs: append([]string{b.commands}, rules.IPTablesDirs()...),
			Now:          func() time.Time { return time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC) },
			DestroySockets: func(ports []uint16, peers []netip.Addr) func() (int, error) {
				b.destroyed = append(b.destroyed, fmt.Sprint(ports, peers, b.recorded()))
				return func() (int, error) { return 1, nil }
			},
			DropQueued: func(ip netip.Addr) error {
				b.destroyed = append(b.destroyed, fmt.Sprint("queued for ", ip))
				return nil
			},
		},
		Links:    func() (map[int]string, error) { return b.links, nil },
		Filtered: func(map[int]string) (map[int]bool, error) { return nil, nil },
		Addresses: func(netnsPath, ifName string) ([]netip.Addr, error) {
			b.lookups++
			if pod := b.pods[netnsPath]; pod != nil && ifName == "eth0" {
				return pod.IPs, nil
			}
			return nil, nil
		},
		HostSide: func(netnsPath, _ string) string {
			if pod := b.pods[netnsPath]; pod != nil {
				return pod.Name
			}
			return ""
		},
		CutConnections: func(service netip.AddrPort) (int, error) { b.cuts = append(b.cuts, service); return 0, nil },
		WatchRules:     func(context.Context, func()) error { return nil },
	}
	cache := Cache{
		Dir: filepath.Join(t.TempDir(), "cni"), ParsePod: podOf,
		Chained: func() ([]string, error) { return b.chained, nil }, HasPlugin: func([]byte) bool { return false },
	}
	b.Agent = New(Config{Settings: settings, Cache: cache, Interval: 10 * time.Second}, system, slog.New(slog.NewTextHandler(&b.output, nil)))
	t.Cleanup(b.Close)
	return b
}

// podOf reads the arguments that the tests use.
func podOf(args string) (attachment.Pod, error) {
	var pod attachment.Pod
	for pair := range strings.SplitSeq(args, ";") {
		switch key, value, _ := strings.Cut(pair, "="); key {
		case "K8S_POD_NAMESPACE":
			pod.Namespace = value
		case "K8S_POD_NAME":
			pod.Name = value
		}
	}
	if (pod.Namespace == "") != (pod.Name == "") {
		return attachment.Pod{}, errors.New("half a pod")
	}
	return pod, nil
}

func (b *bed) must(err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}

// backends runs a test once with each backend.
func backends(t *testing.T, test func(*testing.T, string)) {
	for _, backend := range []string{"nftables", "iptables"} {
		t.Run(backend, func(t *testing.T) { test(t, backend) })
	}
}

// pod gives the node a pod whose veth is routed, and returns what its ADD is asked with.
func (b *bed) pod(id string, index int, ips ...string) attach.Request {
	b.Helper()
	r := attach.Request{ContainerID: id, IfName: "eth0", Netns: "/netns/" + id, Network: "net", Pod: attachment.Pod{Namespace: "team", Name: id}}
	for _, ip := range ips {
		r.IPs = append(r.IPs, netip.MustParseAddr(ip))
	}
	link := &hostlink.Link{Name: fmt.Sprintf("veth%d", index), Index: index, IPs: r.IPs}
	b.pods[r.Netns], b.links[index] = link, link.Name
	return r
}

func (b *bed) attached(r attach.Request) attach.Request {
	b.Helper()
	_, err := b.node.Attach(b.Context(), r)
	b.must(err)
	return r
}

func (b *bed) round() {
	b.Helper()
	b.must(b.Round(b.Context()))
	b.Close()
}

// run runs a command in the namespace.
func (b *bed) run(command string) string {
	b.Helper()
	words := strings.Fields(command)
	out, err := exec.Command(words[0], words[1:]...).CombinedOutput()
	if err != nil {
		b.Fatalf("%s: %v\n%s", command, err, out)
	}
	return string(out)
}

// allRules returns all rules of the namespace, sorted.
func (b *bed) allRules() string {
	b.Helper()
	lines, err := ruleset.All()
	b.must(err)
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// files tells one version of each file of the state directory from the next.
func (b *bed) files() map[string]string {
	b.Helper()
	files := make(map[string]string)
	err := filepath.WalkDir(b.node.StateDir, func(path string, _ fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		var st unix.Stat_t
		if err == nil {
			err = unix.Lstat(path, &st)
		}
		files[strings.TrimPrefix(path, b.node.StateDir)] = fmt.Sprint(st.Ino, st.Ctim, st.Size)
		return err
	})
	b.must(err)
	return files
}

// recorded are the identities of the records.
func (b *bed) recorded() []string {
	b.Helper()
	records, err := b.node.Records.List()
	b.must(err)
	var ids []string
	for _, r := range records {
		ids = append(ids, r.ID())
	}
	return ids
}

// log is what was said since the last question.
func (b *bed) log() string {
	output := b.output.String()
	b.output.Reset()
	return output
}

// cut are the services whose connections were cut since the last question.
func (b *bed) cut() []netip.AddrPort {
	cuts := b.cuts
	b.cuts = nil
	return cuts
}

func (b *bed) write(path, content string) {
	b.Helper()
	b.must(os.MkdirAll(filepath.Dir(path), 0o755))
	b.must(os.WriteFile(path, []byte(content), 0o600))
}
