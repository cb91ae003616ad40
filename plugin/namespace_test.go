package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/pkg/node"
	"github.com/kube2iam-cni/kube2iam-cni/test/nftlist"
)

// testNode is a host, a pod and a metadata service, each in a network namespace that lives as long as the test. The test's
// thread is in the host's.
type testNode struct {
	*testing.T
	*plugin
	host, pod, service netns.NsHandle
	out, errors        bytes.Buffer
	commands           string // directory of the iptables commands
	stateDir           string
	kind, backend      string
}

const (
	uplink4, uplink6   = "192.168.7.2", "fd00:7::2"
	service4, service6 = "169.254.169.254", "fd00:ec2::254"
	pod4, pod6         = "10.1.0.5", "fd00:1::5"
)

// newNode makes a node with a pod that is "routed" or "bridged". It needs root.
func newNode(t *testing.T, kind, backend string) *testNode {
	t.Helper()
	runtime.LockOSThread()
	t.Setenv("XTABLES_LOCKFILE", filepath.Join(t.TempDir(), "xtables.lock"))
	n := &testNode{T: t, commands: t.TempDir(), stateDir: filepath.Join(t.TempDir(), "state"), kind: kind, backend: backend}
	n.service, n.pod, n.host = n.newNetns(), n.newNetns(), n.newNetns()
	n.standIn()
	n.plugin = &plugin{
		System: node.Host(),
		stdout: &n.out,
		log:    slog.New(slog.NewTextHandler(&n.errors, nil)),
	}
	n.Dirs = []string{n.commands}
	n.Now = func() time.Time { return time.Date(2026, 11, 23, 12, 0, 0, 0, time.FixedZone("", 3600)) }
	for _, sysctl := range []string{"net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"} {
		n.must(os.WriteFile("/proc/sys/"+sysctl, []byte("1"), 0o644))
	}
	n.ip(n.host, "link set lo up", "link add uplink type veth peer name far", "addr add "+uplink4+"/24 dev uplink",
		"addr add "+uplink6+"/64 dev uplink nodad", "link set uplink up")
	n.give("far", n.service)
	n.ip(n.service, "link set lo up", "addr add "+service4+"/32 dev lo", "addr add "+service6+"/128 dev lo nodad",
		"addr add 192.168.7.1/24 dev far", "addr add fd00:7::1/64 dev far nodad", "link set far up",
		"route add 10.1.0.0/16 via "+uplink4, "route add fd00:1::/64 via "+uplink6)
	n.ip(n.host, "route add default via 192.168.7.1", "route add default via fd00:7::1")
	n.attach(kind, "veth0", n.pod, pod4, pod6)
	return n
}

// attach gives a namespace an eth0 with the addresses, as a CNI plugin before this one does.
func (n *testNode) attach(kind, hostLink string, pod netns.NsHandle, ip4, ip6 string) {
	n.Helper()
	n.ip(n.host, "link add "+hostLink+" type veth peer name eth0")
	n.give("eth0", pod)
	switch kind {
	case "routed":
		n.ip(n.host, "addr add 10.1.0.1/32 dev "+hostLink, "addr add fe80::1/64 dev "+hostLink+" nodad", "link set "+hostLink+" up",
			"route add "+ip4+"/32 dev "+hostLink, "route add "+ip6+"/128 dev "+hostLink)
	case "bridged":
		if _, err := netlink.LinkByName("br0"); err != nil {
			n.ip(n.host, "link add br0 type bridge", "addr add 10.1.0.1/16 dev br0", "addr add fe80::1/64 dev br0 nodad",
				"addr add fd00:1::1/64 dev br0 nodad", "link set br0 up")
		}
		n.ip(n.host, "link set "+hostLink+" master br0 up")
	default:
		n.Fatalf("a pod that is %q", kind)
	}
	n.ip(pod, "link set lo up", "addr add "+ip4+"/16 dev eth0", "addr add "+ip6+"/64 dev eth0 nodad", "link set eth0 up",
		"route add default via 10.1.0.1", "route add default via fe80::1 dev eth0")
}

// standIn makes the iptables commands of the node: each notes its call, fails if it is told to, and else becomes the real
// one.
func (n *testNode) standIn() {
	n.Helper()
	for _, name := range []string{"iptables-nft", "ip6tables-nft", "iptables-legacy", "ip6tables-legacy"} {
		real, err := exec.LookPath(name)
		n.must(err)
		for _, with := range []string{"", "-restore", "-save"} {
			n.must(os.WriteFile(filepath.Join(n.commands, name+with), []byte(`#!/bin/sh
dir=${0%/*} name=${0##*/} input=
case $name in *-restore) input=$(/bin/cat) ;; esac
echo "$name $*" >>"$dir/log"
if [ -e "$dir/fail" ]; then
	read -r status part <"$dir/fail"
	case "$name $* $input" in *"$part"*) echo "told to fail" >&2; exit "$status" ;; esac
fi
printf '%s\n' "$input" | `+real+with+` "$@"
`), 0o755))
		}
	}
}

// fail makes the calls that contain part fail; with status 0 none fails any more.
func (n *testNode) fail(status int, part string) {
	n.Helper()
	file := filepath.Join(n.commands, "fail")
	if status == 0 {
		n.must(os.Remove(file))
		return
	}
	n.must(os.WriteFile(file, fmt.Appendf(nil, "%d %s\n", status, part), 0o644))
}

// calls are the iptables commands that were run since the last question.
func (n *testNode) calls() []string {
	n.Helper()
	file := filepath.Join(n.commands, "log")
	data, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	n.must(err)
	n.must(os.Remove(file))
	return strings.Split(strings.TrimSpace(string(data)), "\n")
}

func (n *testNode) must(err error) {
	n.Helper()
	if err != nil {
		n.Fatal(err)
	}
}

func (n *testNode) newNetns() netns.NsHandle {
	n.Helper()
	ns, err := netns.New()
	if err != nil {
		n.Fatalf("new network namespace (these tests need root): %v", err)
	}
	n.Cleanup(func() { ns.Close() })
	// An address is there at once, and not after a second or two in which others are asked whether it is theirs.
	n.must(os.WriteFile("/proc/sys/net/ipv6/conf/default/accept_dad", []byte("0"), 0o644))
	return ns
}

// newPod is one more pod of the node.
func (n *testNode) newPod(kind, hostLink, ip4, ip6 string) netns.NsHandle {
	n.Helper()
	pod := n.newNetns()
	n.must(netns.Set(n.host))
	n.attach(kind, hostLink, pod, ip4, ip6)
	return pod
}

// in runs a function on a thread that is in a namespace, and dies with it.
func (n *testNode) in(ns netns.NsHandle, do func()) {
	n.Helper()
	entered := make(chan error)
	go func() {
		runtime.LockOSThread()
		err := netns.Set(ns)
		if err == nil {
			do()
		}
		entered <- err
	}()
	n.must(<-entered)
}

func (n *testNode) ip(ns netns.NsHandle, commands ...string) {
	n.Helper()
	n.in(ns, func() {
		batch := exec.Command("ip", "-batch", "-")
		batch.Stdin = strings.NewReader(strings.Join(commands, "\n"))
		if out, err := batch.CombinedOutput(); err != nil {
			n.Errorf("ip: %v\n%s\n%s", err, strings.Join(commands, "\n"), out)
		}
	})
	if n.Failed() {
		n.FailNow()
	}
}

func (n *testNode) give(link string, to netns.NsHandle) {
	n.Helper()
	l, err := netlink.LinkByName(link)
	n.must(err)
	n.must(netlink.LinkSetNsFd(l, int(to)))
}

// run runs a real command on the host.
func (n *testNode) run(command string) string {
	n.Helper()
	words := strings.Fields(command)
	out, err := exec.Command(words[0], words[1:]...).CombinedOutput()
	if err != nil {
		n.Fatalf("%s: %v\n%s", command, err, out)
	}
	return string(out)
}

// rules is every rule of the host, as the save commands write them without comments and counters.
func (n *testNode) rules() string {
	n.Helper()
	return strings.Join(append(n.iptablesRules(), n.nftables()...), "\n")
}

func (n *testNode) iptablesRules() (kept []string) {
	n.Helper()
	for _, save := range []string{"iptables-nft-save", "ip6tables-nft-save", "iptables-legacy-save", "ip6tables-legacy-save"} {
		for line := range strings.Lines(n.run(save)) {
			if strings.HasPrefix(line, ":") {
				line, _, _ = strings.Cut(line, " [")
			}
			if !strings.HasPrefix(line, "#") {
				kept = append(kept, save+": "+strings.TrimSpace(line))
			}
		}
	}
	return kept
}

// nftables is what stands in our tables.
func (n *testNode) nftables() []string {
	n.Helper()
	lines, err := nftlist.Ours(func(args ...string) (string, error) {
		out, err := exec.Command("nft", args...).CombinedOutput()
		return string(out), err
	})
	n.must(err)
	return lines
}

// ours are the rules with which the pods are redirected.
func (n *testNode) ours() []string {
	n.Helper()
	var ours []string
	for line := range strings.Lines(n.rules()) {
		if strings.Contains(line, "-A KUBE2IAM-CNI") || strings.Contains(line, " : 192.168.7.") || strings.Contains(line, " : fd00:7:") {
			ours = append(ours, strings.TrimSpace(line))
		}
	}
	return ours
}

// state is the names of the records, and of the addresses that they hold.
func (n *testNode) state() []string {
	n.Helper()
	var names []string
	for _, dir := range []string{"attachments", "by-ip"} {
		entries, err := os.ReadDir(filepath.Join(n.stateDir, dir))
		if !errors.Is(err, os.ErrNotExist) {
			n.must(err)
		}
		for _, e := range entries {
			names = append(names, dir+"/"+e.Name())
		}
	}
	return names
}

func (n *testNode) record(containerID string) *attachment.Record {
	n.Helper()
	r, err := attachment.In(n.stateDir).Get(containerID, "eth0")
	n.must(err)
	return r
}

// serve answers each connection to an address of a namespace with a word and the client's address.
func (n *testNode) serve(ns netns.NsHandle, addr, word string) {
	n.Helper()
	var listener net.Listener
	n.in(ns, func() {
		var err error
		if listener, err = net.Listen("tcp", addr); err != nil {
			n.Error(err)
		}
	})
	if n.Failed() {
		n.FailNow()
	}
	n.Cleanup(func() { listener.Close() })
	go func() {
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			fmt.Fprintf(c, "%s to %s", word, netip.MustParseAddrPort(c.RemoteAddr().String()).Addr())
			c.Close()
		}
	}()
}

// dial tells what a client in a namespace meets: what was served, "refused", or "silence" for as long as it waited.
func (n *testNode) dial(ns netns.NsHandle, source, addr string, wait time.Duration) (answer string) {
	n.Helper()
	n.in(ns, func() {
		d := net.Dialer{Timeout: wait}
		if source != "" {
			d.LocalAddr = &net.TCPAddr{IP: net.ParseIP(source)}
		}
		c, err := d.DialContext(context.Background(), "tcp", addr)
		var timeout net.Error
		switch {
		case errors.Is(err, syscall.ECONNREFUSED):
			answer = "refused"
			return
		case errors.As(err, &timeout) && timeout.Timeout():
			answer = "silence"
			return
		case err != nil:
			answer = err.Error()
			return
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(wait))
		data, err := io.ReadAll(c)
		if answer = string(data); err != nil {
			answer += err.Error()
		}
	})
	return answer
}

// args are a runtime's for a container in a namespace whose eth0 has the addresses.
func (n *testNode) args(containerID string, ns netns.NsHandle, ips ...string) *skel.CmdArgs {
	n.Helper()
	var configs []map[string]string
	for _, ip := range ips {
		bits := "/16"
		if strings.Contains(ip, ":") {
			bits = "/64"
		}
		configs = append(configs, map[string]string{"address": ip + bits})
	}
	return &skel.CmdArgs{
		ContainerID: containerID,
		Netns:       fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), int(ns)),
		IfName:      "eth0",
		Args:        "IgnoreUnknown=1;K8S_POD_NAMESPACE=team;K8S_POD_NAME=" + containerID + ";K8S_POD_UID=uid-" + containerID,
		Path:        "/opt/cni/bin",
		StdinData: n.conf(map[string]any{
			"prevResult": map[string]any{"cniVersion": "1.1.0", "ips": configs},
		}),
	}
}

// conf is the network configuration with some keys more.
func (n *testNode) conf(more map[string]any) []byte {
	n.Helper()
	conf := map[string]any{
		"cniVersion": "1.1.0", "name": "net", "type": "kube2iam-cni", "stateDir": n.stateDir, "backend": n.backend,
	}
	for key, value := range more {
		conf[key] = value
	}
	data, err := json.Marshal(conf)
	n.must(err)
	return data
}
