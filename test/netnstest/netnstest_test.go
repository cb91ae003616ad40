package netnstest

import (
	"io"
	"net"
	"os"
	"testing"

	"github.com/vishvananda/netns"
)

func TestMain(m *testing.M) { Main(m) }

// TestNamespaces connects two namespaces. The goroutine of the test returns to its own after each
// call.
func TestNamespaces(t *testing.T) {
	host, pod := New(t), New(t)
	host.Enter()
	host.Veth("veth0", pod, "eth0")
	host.IP("addr add 10.1.0.1/24 dev veth0")
	pod.IP("addr add 10.1.0.5/24 dev eth0", "link set eth0 up")
	l := pod.Listen("tcp", "10.1.0.5:80")
	go func() {
		if c, err := l.Accept(); err == nil {
			io.WriteString(c, "pod")
			c.Close()
		}
	}()
	c, err := net.Dial("tcp", "10.1.0.5:80")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if got, err := io.ReadAll(c); string(got) != "pod" || err != nil {
		t.Errorf("got %q, %v", got, err)
	}
	pod.Sysctl("net/ipv4/ip_forward", "1")
	if got := pod.Run("cat /proc/sys/net/ipv4/ip_forward"); got != "1\n" {
		t.Errorf("ip_forward is %q", got)
	}
	now, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	defer now.Close()
	if !now.Equal(host.NsHandle) {
		t.Error("the test has left the namespace that it entered")
	}
	byPath, err := netns.GetFromPath(pod.Path())
	if err != nil {
		t.Fatal(err)
	}
	defer byPath.Close()
	if !byPath.Equal(pod.NsHandle) {
		t.Error("the path leads to another namespace")
	}
}

// TestMounts: iptables-legacy locks a file in /run, and other programs read /sys/class/net.
func TestMounts(t *testing.T) {
	if !InUserNamespace() {
		t.Skip("root uses the machine's own mounts")
	}
	New(t)
	if err := os.WriteFile("/run/netnstest", nil, 0o600); err != nil {
		t.Error(err)
	}
	links, err := os.ReadDir("/sys/class/net")
	if err != nil || len(links) != 1 {
		t.Errorf("/sys/class/net has %v, %v, want lo", links, err)
	}
}
