package netns

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"unsafe"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

// bpf makes a call of bpf(2).
func bpf[T any](command uintptr, attr *T) (int, error) {
	fd, _, errno := unix.Syscall(unix.SYS_BPF, command, uintptr(unsafe.Pointer(attr)), unsafe.Sizeof(*attr))
	if errno != 0 {
		return -1, fmt.Errorf("bpf %d: %w", command, errno)
	}
	return int(fd), nil
}

type instruction struct {
	code      uint8
	registers uint8 // source<<4 | destination
	offset    int16
	immediate int32
}

// classifier loads a BPF program such as eBPF datapaths attach to a veth's ingress. It redirects
// packets for the metadata service to another interface with the neighbour's address filled in,
// as host routing does, or drops them, as a policy does. All other packets pass.
func classifier(toInterface int, drop bool) (int, error) {
	const goOn = -1 // TC_ACT_UNSPEC, TCX_NEXT
	program := []instruction{
		{0xbf, 1<<4 | 6, 0, 0},           // r6 = the packet
		{0x61, 1<<4 | 0, 16, 0},          // r0 = its protocol
		{0x55, 0, 9, 0x0008},             // not IPv4: go on
		{0x20, 0, 0, 14 + 16},            // r0 = its destination
		{0x56, 0, 7, -0x5601_5602},       // not 169.254.169.254: go on
		{0xb7, 1, 0, int32(toInterface)}, // r1 = the interface
		{0xb7, 2, 0, 0},
		{0xb7, 3, 0, 0},
		{0xb7, 4, 0, 0},
		{0x85, 0, 0, 152}, // bpf_redirect_neigh
		{0x95, 0, 0, 0},
		{0xb7, 0, 0, goOn},
		{0x95, 0, 0, 0},
	}
	// The jumps lead to what is before the last instruction.
	program[2].offset, program[4].offset = 8, 6
	if drop {
		const shot = 2 // TC_ACT_SHOT, TCX_DROP
		program = append(program[:5], instruction{0xb7, 0, 0, shot}, instruction{0x95, 0, 0, 0}, instruction{0xb7, 0, 0, goOn}, instruction{0x95, 0, 0, 0})
		program[2].offset, program[4].offset = 4, 2
	} else if toInterface == 0 {
		program = []instruction{{0xb7, 0, 0, goOn}, {0x95, 0, 0, 0}}
	}
	return load(3 /* BPF_PROG_TYPE_SCHED_CLS */, program)
}

func load(kind uint32, program []instruction) (int, error) {
	licence := []byte("GPL\x00")
	return bpf(5 /* BPF_PROG_LOAD */, &struct {
		kind, count             uint32
		instructions, licence   uint64
		logLevel, logSize       uint32
		log                     uint64
		kernelVersion, flags    uint32
		name                    [16]byte
		ifIndex, expectedAttach uint32
	}{kind: kind, count: uint32(len(program)),
		instructions: uint64(uintptr(unsafe.Pointer(&program[0]))), licence: uint64(uintptr(unsafe.Pointer(&licence[0])))})
}

// dropping is the target of a classifier that drops.
const dropping = "nowhere"

// classify attaches a program to the ingress of the pod's host side by tc, tcx or XDP until the
// test ends. The XDP program passes or drops all packets.
func (n *node) classify(link string, by, to string) {
	n.t.Helper()
	err := n.Node.Do(func() error {
		veth, err := netlink.LinkByName(link)
		if err != nil {
			return err
		}
		index := 0
		if to != "" && to != dropping {
			other, err := netlink.LinkByName(to)
			if err != nil {
				return err
			}
			index = other.Attrs().Index
		}
		if by == "xdp" {
			verdict := int32(2) // XDP_PASS
			if to == dropping {
				verdict = 1 // XDP_DROP
			}
			program, err := load(6 /* BPF_PROG_TYPE_XDP */, []instruction{{0xb7, 0, 0, verdict}, {0x95, 0, 0, 0}})
			if err != nil {
				return err
			}
			n.t.Cleanup(func() { unix.Close(program) })
			return netlink.LinkSetXdpFd(veth, program)
		}
		program, err := classifier(index, to == dropping)
		if err != nil {
			return err
		}
		n.t.Cleanup(func() { unix.Close(program) })
		if by == "tcx" {
			attached, err := bpf(28 /* BPF_LINK_CREATE */, &struct{ program, ifIndex, attachType, flags uint32 }{uint32(program), uint32(veth.Attrs().Index), 46, 0})
			if err == nil {
				n.t.Cleanup(func() { unix.Close(attached) })
			}
			return err
		}
		qdisc := &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: veth.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}}
		if err := netlink.QdiscAdd(qdisc); err != nil && !errors.Is(err, unix.EEXIST) {
			return err
		}
		return netlink.FilterAdd(&netlink.BpfFilter{
			FilterAttrs: netlink.FilterAttrs{LinkIndex: veth.Attrs().Index, Parent: netlink.HANDLE_MIN_INGRESS, Handle: 1, Protocol: unix.ETH_P_ALL, Priority: 1},
			Fd:          program, Name: "classifier", DirectAction: true,
		})
	})
	if by == "tcx" && errors.Is(err, unix.EINVAL) {
		n.t.Skipf("this kernel has no tcx: %v", err) // before Linux 6.6
	}
	n.must(err)
}

// hostLink returns the host side of a pod without a record.
func (n *node) hostLink(s *testbed.Sandbox) string {
	n.t.Helper()
	for _, i := range s.Result.Interfaces {
		name := ""
		n.must(n.Node.Do(func() error {
			if link, err := netlink.LinkByName(i.Name); err == nil && i.Sandbox == "" && link.Type() == "veth" {
				name = i.Name
			}
			return nil
		}))
		if name != "" {
			return name
		}
	}
	n.t.Fatalf("no veth in %+v", s.Result)
	return ""
}

// TestNetfilterBypassed: a BPF program at the veth's ingress takes packets past netfilter, as
// eBPF host routing does. ADD finds out by a packet and refuses, unless the configuration asks
// for the redirection inside the pod. A program that passes packets on changes nothing.
func TestNetfilterBypassed(t *testing.T) {
	for _, by := range []string{"tc", "tcx"} {
		t.Run(by, func(t *testing.T) {
			onThese(t, []setup{bridgeIPTables, bridged, routedIPTables, routed}, func(t *testing.T, n *node) {
				chain := n.SetChain()
				passed, seen := n.pending("passed", "app"), n.pending("seen", "other")
				for s, to := range map[*testbed.Sandbox]string{passed: "eth0", seen: ""} {
					n.must(n.Add(t.Context(), s))
					n.must(n.KubeAPI.SetStatus("default", s.Name, "Running", s.IP.String()))
					n.classify(n.hostLink(s), by, to)
				}
				if got := n.get(passed, credentials); got.status != http.StatusOK || got.body != testbed.NodeRole {
					t.Fatalf("without any guard: %s, want the node's own role", got)
				}
				n.round()
				if _, err := n.dialService(passed, passed.IP); err == nil {
					t.Fatal("a pod past netfilter reaches the real service: the uplink is not guarded")
				}
				if got := n.get(seen, credentials); !got.refused() {
					t.Fatalf("not past netfilter: %s, want a refused connection", got)
				}
				n.IMDS.Reset()
				n.SetChain(chain...)
				n.proxy(impatient...)
				way := map[string]attachment.Datapath{"bridge": attachment.DatapathBridged, "ptp": attachment.DatapathRouted}[n.primary]
				n.must(n.AddAgain(t.Context(), seen, seen.Result))
				if got := n.record(seen, "eth0").Datapath; got != way {
					t.Errorf("recorded %s, want %s", got, way)
				}
				// Silence is no reason to give up the host's rules: ADD refuses, until somebody
				// says what the datapath is.
				err := n.AddAgain(t.Context(), passed, passed.Result)
				if err == nil || !strings.Contains(err.Error(), "did not see a packet") || !strings.Contains(err.Error(), `"datapath" to "pod"`) {
					t.Errorf("ADD past netfilter: %v, want an error that says so", err)
				}
				n.wantNoTrace(passed)
				said := testbed.Kube2IAM(n.backend)
				said["datapath"] = "pod"
				n.SetChain(said)
				n.must(n.AddAgain(t.Context(), passed, passed.Result))
				n.SetChain(chain...)
				if got := n.record(passed, "eth0").Datapath; got != attachment.DatapathPod {
					t.Errorf("recorded %s, want %s", got, attachment.DatapathPod)
				}
				n.wantOwn(passed, "app")
				n.wantOwn(seen, "other")
				if left := n.onNode("nft list tables"); strings.Contains(left, "probe") {
					t.Errorf("tables: %s", left)
				}
				n.wantOnlyTheNodeAsked()
				n.must(n.StopPod(t.Context(), passed))
				n.wantNoTrace(passed)

				// A filter that comes when the pod has long been attached: the agent says so, and
				// gives up nothing of what binds the pod's address to its link.
				late := n.run("late", "app")
				n.wantOwn(late, "app")
				rules := n.rules()
				n.classify(n.hostLink(late), by, "eth0")
				if log := n.round(); !strings.Contains(log, "did not see a packet") || !strings.Contains(log, "pod=late") || strings.Contains(log, "pod=seen") {
					t.Errorf("the agent said\n%s", log)
				}
				if got := n.record(late, "eth0").Datapath; got != way {
					t.Errorf("recorded %s, want %s", got, way)
				}
				if diff := cmp.Diff(rules, n.rules()); diff != "" {
					t.Errorf("the agent changed rules (-before +after):\n%s", diff)
				}
			})
		})
	}
}
