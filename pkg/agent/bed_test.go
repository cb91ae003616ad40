package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attach"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/rules"
	"github.com/kube2iam-cni/kube2iam-cni/test/netnstest"
	"github.com/kube2iam-cni/kube2iam-cni/test/testhost"
)

// bed is an agent whose rules and records are real, in a network namespace and a directory of the
// test, and whose interfaces and pods are fake.
type bed struct {
	*testhost.Fake
	*Agent
	links    map[int]string // the host's interfaces
	uplinks  fakeUplinks
	cuts     []netip.AddrPort
	chained  []string // the networks that the plugin is chained in
	lookups  int      // of addresses in network namespaces
	commands string   // a directory of iptables commands that come before the node's
}

const testMark = 0x1000

var services = []netip.AddrPort{netip.MustParseAddrPort("169.254.169.254:80"), netip.MustParseAddrPort("[fd00:ec2::254]:80")}

func TestMain(m *testing.M) { netnstest.Main(m) }

// newBed returns the agent of a node without pods.
func newBed(t *testing.T, backend string) *bed {
	t.Helper()
	b := &bed{Fake: testhost.NewFake(t), commands: t.TempDir(), links: map[int]string{1: "lo"}, chained: []string{"net"}}
	settings := attach.Settings{
		ProxyPort: 8181, MetadataIP: services[0].Addr(), StateDir: b.StateDir,
		Backend: backend, Guard: true, Mark: testMark,
	}
	system := System{
		System: attach.System{
			FindLink:       b.FindLink,
			NodeIP:         testhost.NodeIP,
			HasIPv6:        func() bool { return true },
			IPTablesDirs:   append([]string{b.commands}, rules.IPTablesDirs()...),
			Now:            func() time.Time { return time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC) },
			DestroySockets: b.DestroySockets,
			DropQueued:     b.DropQueued,
		},
		Links:            func() (map[int]string, error) { return b.links, nil },
		BypassCandidates: func(map[int]string) (map[int]bool, error) { return nil, nil },
		Addresses: func(netnsPath, ifName string) ([]netip.Addr, error) {
			b.lookups++
			if pod := b.Pods[netnsPath]; pod != nil && ifName == "eth0" {
				return pod.IPs, nil
			}
			return nil, nil
		},
		HostSide: func(netnsPath, _ string) string {
			if pod := b.Pods[netnsPath]; pod != nil {
				return pod.Name
			}
			return ""
		},
		CutConnections: func(service netip.AddrPort) (int, error) { b.cuts = append(b.cuts, service); return 0, nil },
		WatchRules:     func(context.Context, func()) error { return nil },
		NewUplinks:     func(netip.Addr) (Uplinks, error) { return b.uplinks, b.uplinks.unsupported },
		RemoveUplinks:  func() error { b.uplinks.removals++; return nil },
		WatchUplinks:   func(context.Context, netip.Addr, func()) error { return nil },
	}
	cache := Cache{
		Dir: filepath.Join(t.TempDir(), "cni"), ParsePod: podOf,
		Chained: func() ([]string, error) { return b.chained, nil }, HasPlugin: func([]byte) bool { return false },
	}
	b.Agent = New(Config{Settings: settings, Cache: cache, Interval: 10 * time.Second}, system, b.Logger)
	t.Cleanup(b.Close)
	return b
}

// fakeUplinks returns the same in each round.
type fakeUplinks struct {
	attached         []string
	err, unsupported error
	removals         int
}

func (u fakeUplinks) Reconcile() ([]string, error) { return u.attached, u.err }
func (fakeUplinks) Close() error                   { return nil }

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

// pod adds a pod with a routed veth, and returns the request of its ADD.
func (b *bed) pod(id string, index int, ips ...string) attach.Request {
	netns, addrs := b.AddPod(id, index, ips...)
	b.links[index] = b.Pods[netns].Name
	return attach.Request{ContainerID: id, IfName: "eth0", Netns: netns, Network: "net", Pod: attachment.Pod{Namespace: "team", Name: id}, IPs: addrs}
}

func (b *bed) attached(r attach.Request) attach.Request {
	b.Helper()
	_, err := b.node.Attach(b.Context(), r)
	b.Must(err)
	return r
}

func (b *bed) round() {
	b.Helper()
	b.Must(b.Round(b.Context()))
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
	b.Must(err)
	return files
}

// cut are the services whose connections were cut since the last question.
func (b *bed) cut() []netip.AddrPort {
	cuts := b.cuts
	b.cuts = nil
	return cuts
}

func (b *bed) write(path, content string) {
	b.Helper()
	b.Must(os.MkdirAll(filepath.Dir(path), 0o755))
	b.Must(os.WriteFile(path, []byte(content), 0o600))
}
