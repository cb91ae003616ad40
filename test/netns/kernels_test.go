package netns

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kube2iam-cni/kube2iam-cni/pkg/attachment"
	"github.com/kube2iam-cni/kube2iam-cni/test/testbed"
)

// What depends on the kernel. Each test skips by the kernel's own word only.

// needNoNFTables skips a test if the kernel has nf_tables.
func needNoNFTables(t *testing.T) {
	t.Helper()
	conn, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.ListTables(); err == nil {
		t.Skip("this kernel has nf_tables")
	} else if !errors.Is(err, unix.EINVAL) {
		t.Fatal(err)
	}
}

// TestKernelWithoutNFTables: on a kernel without nf_tables, iptables makes the guard and the
// redirections. The nftables backend is refused with that reason and leaves the node guarded.
func TestKernelWithoutNFTables(t *testing.T) {
	needNoNFTables(t)
	var all []setup
	for _, backend := range []string{"auto", "iptables", "nftables"} {
		all = append(all, dual(setup{primary: "ptp", backend: backend}), dual(setup{primary: "bridge", backend: backend}))
	}
	onThese(t, all, func(t *testing.T, n *node) {
		n.proxy(impatient...)
		works := n.backend != "nftables"
		wantUnsupported := func(what string, err error) {
			t.Helper()
			if works && err != nil || !works && (err == nil || !strings.Contains(err.Error(), "does not support") || strings.Contains(err.Error(), "busy")) {
				t.Errorf("%s: %v", what, err)
			}
		}
		chain := n.SetChain()
		old := n.pending("old", "app")
		n.must(n.Add(t.Context(), old))
		guard := func(when string) {
			t.Helper()
			_, err := n.AgentRound(t.Context(), "--backend", n.backend)
			wantUnsupported("the agent's round "+when, err)
			for _, f := range fronts(old) {
				n.wantSilenceOrRefusal(old, f.pod)
			}
		}
		guard("before any pod")
		for _, table := range []string{"filter", "mangle"} {
			n.onNode("iptables-legacy -t " + table + " -F")
			n.onNode("ip6tables-legacy -t " + table + " -F")
		}
		guard("after a flush")
		n.SetChain(chain...)
		pod, err := n.RunPod(t.Context(), "default", "pod", map[string]string{roleKey: "app"})
		wantUnsupported("ADD", err)
		if err != nil {
			n.must(n.StopPod(t.Context(), old))
			return
		}
		if got := n.record(pod, "eth0").Backend; got != attachment.BackendIPTables {
			t.Errorf("recorded %s", got)
		}
		n.wantOwn(pod, "app")
		n.wantOwnAt(pod, "http://"+testbed.MetadataAddr6, "app")
		n.must(n.Check(t.Context(), pod))
		for _, stranger := range []string{"10.201.0.200/32", "fd00:201::200/128"} {
			n.address(pod, "add", stranger)
			n.wantSilenceOrRefusal(pod, netip.MustParsePrefix(stranger).Addr())
		}
		_, err = n.AgentRound(t.Context(), "--backend", n.backend)
		n.must(err)
		n.wantOwn(old, "app") // adopted
		n.wantOwn(pod, "app")
		n.must(n.StopPod(t.Context(), pod))
		n.must(n.StopPod(t.Context(), old))
		if left := n.records(); len(left) > 0 {
			t.Errorf("records after the last DEL: %v", left)
		}
		if rules := n.onNode("iptables-legacy-save"); strings.Contains(rules, "DNAT") {
			t.Errorf("rules after the last DEL:\n%s", rules)
		}
	})
}

// needNetkit skips a test if the kernel says that it has no netkit (before Linux 6.7).
func needNetkit(t *testing.T) {
	t.Helper()
	pair := &netlink.Netkit{LinkAttrs: netlink.LinkAttrs{Name: "kube2iam-probe"}}
	pair.SetPeerAttrs(&netlink.LinkAttrs{Name: "kube2iam-peer"})
	err := netlink.LinkAdd(pair)
	if errors.Is(err, unix.EOPNOTSUPP) {
		t.Skipf("this kernel has no netkit: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkDel(pair); err != nil {
		t.Fatal(err)
	}
}

// TestNetkit: the host's rules redirect and guard a pod on a netkit pair as one on a veth.
func TestNetkit(t *testing.T) {
	needNetkit(t)
	var all []setup
	for _, backend := range []string{"auto", "nftables", iptables} {
		all = append(all, setup{primary: "netkitlike", backend: backend})
	}
	onThese(t, all, func(t *testing.T, n *node) {
		n.proxy(impatient...)
		pod, neighbour := n.run("pod", "app"), n.run("neighbour", "other")
		if r := n.record(pod, "eth0"); r.Datapath != attachment.DatapathRouted {
			t.Errorf("recorded %+v", r)
		}
		n.wantOwn(pod, "app")
		n.wantOwn(neighbour, "other")
		n.must(n.Check(t.Context(), pod))
		_, err := pod.Netns.Run(t.Context(), n.ClientEnv(), "nft", "flush", "ruleset")
		n.must(err)
		n.wantOwn(pod, "app")
		for _, address := range []string{neighbour.IP.String(), "10.201.0.200"} {
			n.address(pod, "add", address+"/32")
			n.wantSilenceOrRefusal(pod, netip.MustParseAddr(address))
		}
		n.must(n.StopPod(t.Context(), pod))
		n.wantNoTrace(pod)
		n.wantOnlyTheNodeAsked()
	})
}
