package hostlink

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"
	"unsafe"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/test/netnstest"
)

// netkit makes a pair between the thread's namespace and the pod's. Its primary side is the host's
// or the pod's. It skips the test on a kernel without such devices (before Linux 6.7).
func (n *node) netkit(primaryOnHost bool) netlink.Link {
	n.Helper()
	pair := &netlink.Netkit{LinkAttrs: netlink.LinkAttrs{Name: "nk0"}, Mode: netlink.NETKIT_MODE_L2}
	peer := &netlink.LinkAttrs{Name: "eth0", Namespace: netlink.NsFd(n.pod.NsHandle)}
	if !primaryOnHost {
		pair.Name, pair.Namespace, peer.Name, peer.Namespace = "eth0", netlink.NsFd(n.pod.NsHandle), "nk0", nil
	}
	pair.SetPeerAttrs(peer)
	err := netlink.LinkAdd(pair)
	if errors.Is(err, unix.EOPNOTSUPP) {
		n.Skipf("this kernel has no netkit: %v", err)
	}
	n.must(err)
	link, err := netlink.LinkByName("nk0")
	n.must(err)
	return link
}

// TestNetkit finds the host side of a netkit pair, which must be its primary side.
func TestNetkit(t *testing.T) {
	n := newNode(t)
	host := n.netkit(true)
	n.addr(n.inPod, "eth0", "10.1.0.5/32")
	got, err := Find(n.pod.Path(), "eth0")
	n.must(err)
	want := &Link{Name: "nk0", Index: host.Attrs().Index, IPs: []netip.Addr{netip.MustParseAddr("10.1.0.5")}}
	if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Error(diff)
	}
	if netnstest.InUserNamespace() {
		return // a user namespace may not load programs
	}
	// The program sees the packets that the pod sends.
	program, err := loadClassifier()
	n.must(err)
	defer unix.Close(program)
	attached, err := createLink(program, host.Attrs().Index, netkitPeer)
	n.must(err)
	defer unix.Close(attached)
	if got, err = Find(n.pod.Path(), "eth0"); err != nil || !got.CanBypass {
		t.Errorf("with a program: %+v, %v", got, err)
	}
	all, err := BypassCandidates(map[int]string{host.Attrs().Index: "nk0"})
	n.must(err)
	if !all[host.Attrs().Index] {
		t.Errorf("with a program: %v", all)
	}
}

// TestNetkitPrimaryInPod refuses a pair whose primary side is the pod's: the pod attaches programs
// to it.
func TestNetkitPrimaryInPod(t *testing.T) {
	n := newNode(t)
	n.netkit(false)
	_, err := Find(n.pod.Path(), "eth0")
	if e := (*UnsupportedError)(nil); !errors.As(err, &e) || e.Kind != "netkit" {
		t.Errorf("got %v", err)
	}
}

// TestPrimary needs no kernel with netkit.
func TestPrimary(t *testing.T) {
	if !isPrimary(&netlink.Veth{}) || isPrimary(&netlink.Netkit{}) {
		t.Error("want true for a veth and false for the other side of a netkit")
	}
}

// loadClassifier loads a program that passes every packet to the next one: r0 = -1, exit.
func loadClassifier() (int, error) {
	instructions := []uint64{0xffffffff_000000b7, 0x95}
	licence := []byte("GPL\x00")
	return bpf(5 /* BPF_PROG_LOAD */, &struct {
		kind, count           uint32
		instructions, licence uint64
		_                     [96]byte
	}{3 /* BPF_PROG_TYPE_SCHED_CLS */, uint32(len(instructions)), uint64(uintptr(unsafe.Pointer(&instructions[0]))), uint64(uintptr(unsafe.Pointer(&licence[0]))), [96]byte{}})
}

func createLink(program, ifIndex int, attachType uint32) (int, error) {
	return bpf(28 /* BPF_LINK_CREATE */, &struct{ program, ifIndex, attachType, flags uint32 }{uint32(program), uint32(ifIndex), attachType, 0})
}

func bpf[T any](command uintptr, attr *T) (int, error) {
	fd, _, errno := unix.Syscall(unix.SYS_BPF, command, uintptr(unsafe.Pointer(attr)), unsafe.Sizeof(*attr))
	if errno != 0 {
		return -1, fmt.Errorf("bpf %d: %w", command, errno)
	}
	return int(fd), nil
}
