// Package testhost makes a host, a pod and a metadata service for tests, each in a network
// namespace.
package testhost

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
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
	"github.com/kube2iam-cni/kube2iam-cni/test/netnstest"
	"github.com/kube2iam-cni/kube2iam-cni/test/ruleset"
)

// Host has the network namespaces of a host, a pod and a metadata service. The test runs in the
// host's.
type Host struct {
	*testing.T
	Netns, Pod, Service *netnstest.Netns // Netns is the host's
	Commands            string           // directory of the iptables commands
	StateDir            string
	Kind, Backend       string
}

const (
	Uplink4, Uplink6   = "192.168.7.2", "fd00:7::2"
	Service4, Service6 = "169.254.169.254", "fd00:ec2::254"
	Pod4, Pod6         = "10.1.0.5", "fd00:1::5"
)

// New makes a host with a pod that is "routed" or "bridged". TestMain must call netnstest.Main.
func New(t *testing.T, kind, backend string) *Host {
	t.Helper()
	n := &Host{T: t, Commands: t.TempDir(), StateDir: filepath.Join(t.TempDir(), "state"), Kind: kind, Backend: backend}
	n.Service, n.Pod, n.Netns = netnstest.New(t), netnstest.New(t), netnstest.New(t)
	n.Netns.Enter()
	n.standIn()
	for _, sysctl := range []string{"net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"} {
		n.Netns.Sysctl(sysctl, "1")
	}
	n.Netns.Veth("uplink", n.Service, "far")
	n.IP(n.Netns, "addr add "+Uplink4+"/24 dev uplink", "addr add "+Uplink6+"/64 dev uplink nodad")
	n.IP(n.Service, "addr add "+Service4+"/32 dev lo", "addr add "+Service6+"/128 dev lo nodad",
		"addr add 192.168.7.1/24 dev far", "addr add fd00:7::1/64 dev far nodad", "link set far up",
		"route add 10.1.0.0/16 via "+Uplink4, "route add fd00:1::/64 via "+Uplink6)
	n.IP(n.Netns, "route add default via 192.168.7.1", "route add default via fd00:7::1")
	n.Attach(kind, "veth0", n.Pod, Pod4, Pod6)
	return n
}

// Attach connects a namespace by an eth0 with the addresses, as a primary CNI plugin does.
func (n *Host) Attach(kind, hostLink string, pod *netnstest.Netns, ip4, ip6 string) {
	n.Helper()
	n.Netns.Veth(hostLink, pod, "eth0")
	switch kind {
	case "routed":
		n.IP(n.Netns, "addr add 10.1.0.1/32 dev "+hostLink, "addr add fe80::1/64 dev "+hostLink+" nodad",
			"route add "+ip4+"/32 dev "+hostLink, "route add "+ip6+"/128 dev "+hostLink)
	case "bridged":
		if _, err := netlink.LinkByName("br0"); err != nil {
			n.IP(n.Netns, "link add br0 type bridge", "addr add 10.1.0.1/16 dev br0", "addr add fe80::1/64 dev br0 nodad",
				"addr add fd00:1::1/64 dev br0 nodad", "link set br0 up")
		}
		n.IP(n.Netns, "link set "+hostLink+" master br0 up")
	default:
		n.Fatalf("a pod that is %q", kind)
	}
	n.IP(pod, "addr add "+ip4+"/16 dev eth0", "addr add "+ip6+"/64 dev eth0 nodad", "link set eth0 up",
		"route add default via 10.1.0.1", "route add default via fe80::1 dev eth0")
}

// standIn makes the iptables commands of the node. Each logs its call, fails if FailCommand says
// so, and otherwise runs the real command.
func (n *Host) standIn() {
	n.Helper()
	for _, name := range []string{"iptables", "ip6tables"} {
		real, err := exec.LookPath(name)
		n.Must(err)
		for _, with := range []string{"", "-restore", "-save"} {
			n.Must(os.WriteFile(filepath.Join(n.Commands, name+with), []byte(`#!/bin/sh
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

// FailCommand makes the calls that contain part fail with a status. Status 0 ends it.
func (n *Host) FailCommand(status int, part string) {
	n.Helper()
	file := filepath.Join(n.Commands, "fail")
	if status == 0 {
		n.Must(os.Remove(file))
		return
	}
	n.Must(os.WriteFile(file, fmt.Appendf(nil, "%d %s\n", status, part), 0o644))
}

// Calls returns the iptables commands that were run since the last call of Calls.
func (n *Host) Calls() []string {
	n.Helper()
	file := filepath.Join(n.Commands, "log")
	data, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	n.Must(err)
	n.Must(os.Remove(file))
	return strings.Split(strings.TrimSpace(string(data)), "\n")
}

func (n *Host) Must(err error) {
	n.Helper()
	if err != nil {
		n.Fatal(err)
	}
}

// NewPod attaches another pod.
func (n *Host) NewPod(kind, hostLink, ip4, ip6 string) *netnstest.Netns {
	n.Helper()
	pod := netnstest.New(n.T)
	n.Attach(kind, hostLink, pod, ip4, ip6)
	return pod
}

// In runs a function in a namespace on a thread of its own, which ends with the function.
func (n *Host) In(ns *netnstest.Netns, do func()) {
	n.Helper()
	entered := make(chan error)
	go func() {
		runtime.LockOSThread()
		err := netns.Set(ns.NsHandle)
		if err == nil {
			do()
		}
		entered <- err
	}()
	n.Must(<-entered)
}

// IP runs commands of ip(8) in a namespace.
func (n *Host) IP(ns *netnstest.Netns, commands ...string) {
	n.Helper()
	ns.IP(commands...)
}

// Run runs a command on the host and returns its output.
func (n *Host) Run(command string) string {
	n.Helper()
	words := strings.Fields(command)
	out, err := exec.Command(words[0], words[1:]...).CombinedOutput()
	if err != nil {
		n.Fatalf("%s: %v\n%s", command, err, out)
	}
	return string(out)
}

// Rules returns every rule of the host.
func (n *Host) Rules() string {
	n.Helper()
	lines, err := ruleset.All()
	n.Must(err)
	return strings.Join(lines, "\n")
}

// NFTables returns the rules and elements of kube2iam-cni's tables.
func (n *Host) NFTables() []string {
	n.Helper()
	lines, err := ruleset.Own()
	n.Must(err)
	return lines
}

// Redirections returns the rules and elements that redirect pods.
func (n *Host) Redirections() []string {
	n.Helper()
	var ours []string
	for line := range strings.Lines(n.Rules()) {
		if strings.Contains(line, "-A KUBE2IAM-CNI") || strings.Contains(line, " : 192.168.7.") || strings.Contains(line, " : fd00:7:") {
			ours = append(ours, strings.TrimSpace(line))
		}
	}
	return ours
}

// State returns the names of the records and of the addresses that they hold.
func (n *Host) State() []string {
	n.Helper()
	var names []string
	for _, dir := range []string{"attachments", "by-ip"} {
		entries, err := os.ReadDir(filepath.Join(n.StateDir, dir))
		if !errors.Is(err, os.ErrNotExist) {
			n.Must(err)
		}
		for _, e := range entries {
			names = append(names, dir+"/"+e.Name())
		}
	}
	return names
}

func (n *Host) Record(containerID string) *attachment.Record {
	n.Helper()
	r, err := attachment.In(n.StateDir).Get(containerID, "eth0")
	n.Must(err)
	return r
}

// Serve answers each connection to an address of a namespace with a word and the client's address.
func (n *Host) Serve(ns *netnstest.Netns, addr, word string) {
	n.Helper()
	listener := ns.Listen("tcp", addr)
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

// Dial connects from a namespace and returns the answer, "refused", or "silence" after the timeout.
func (n *Host) Dial(ns *netnstest.Netns, source, addr string, wait time.Duration) (answer string) {
	n.Helper()
	n.In(ns, func() {
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

// Args returns a runtime's arguments for a container whose eth0 has the addresses.
func (n *Host) Args(containerID string, ns *netnstest.Netns, ips ...string) *skel.CmdArgs {
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
		Netns:       ns.Path(),
		IfName:      "eth0",
		Args:        "IgnoreUnknown=1;K8S_POD_NAMESPACE=team;K8S_POD_NAME=" + containerID + ";K8S_POD_UID=uid-" + containerID,
		Path:        "/opt/cni/bin",
		StdinData: n.Conf(map[string]any{
			"prevResult": map[string]any{"cniVersion": "1.1.0", "ips": configs},
		}),
	}
}

// Conf returns the network configuration with additional keys.
func (n *Host) Conf(more map[string]any) []byte {
	n.Helper()
	conf := map[string]any{
		"cniVersion": "1.1.0", "name": "net", "type": "kube2iam-cni", "stateDir": n.StateDir, "backend": n.Backend,
	}
	for key, value := range more {
		conf[key] = value
	}
	data, err := json.Marshal(conf)
	n.Must(err)
	return data
}
